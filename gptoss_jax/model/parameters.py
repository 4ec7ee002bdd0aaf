"""Declares every parameter once, with one letter per dimension.

Initialization, sharding (`parallel/rules.py`), weight decay and Muon's dimensions follow from the letters.
Arrays of rank two or more have them as a suffix (`q_BTNH`). The key, unless a file defines its own: B batch,
T query length, S key length, D hidden, N query heads, K key/value heads, G = N / K, H head size, E experts,
X experts per token, F expert width, P = 2 (gate and up), V vocabulary, L layers, W window, M = B T tokens,
R rows sorted by expert, C chunk. Packed in MXFP4: U = 2 F rows of gate and up, O = D rows of down, each of
g = D / 32 or f = F / 32 blocks of y = 16 bytes. Lower-case dimensions are never split.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.mxfp4.codec import BLOCK_BYTES, BLOCK_SIZE
from gptoss_jax.parallel.rules import storage_spec

# Maps the last two names of a parameter's path to its letters, without the leading dimension of stacked
# layers. r is the rank of an adapter (`model/lora.py`).
LETTERS = {
    "embedding.weight": "VD",
    "head.weight": "VD",
    "attention_norm.scale": "d",
    "attention.q": "DNH",
    "attention.k": "DKH",
    "attention.v": "DKH",
    "attention.out": "NHD",
    "attention.q_bias": "NH",
    "attention.k_bias": "KH",
    "attention.v_bias": "KH",
    "attention.out_bias": "d",
    "attention.sinks": "N",
    "moe_norm.scale": "d",
    "moe.router": "De",
    "moe.router_bias": "e",
    "moe.gate_up": "EDPF",
    "moe.gate_up_bias": "EPF",
    "moe.down": "EFD",
    "moe.down_bias": "Ed",
    # Each block of 32 input values has a scale. Rows of gate and up are interleaved.
    "moe.gate_up_blocks": "EUgy",
    "moe.gate_up_scales": "EUg",
    "moe.down_blocks": "EOfy",
    "moe.down_scales": "EOf",
    "final_norm.scale": "d",
    "attention.q_lora_a": "Dr",
    "attention.q_lora_b": "rNH",
    "attention.k_lora_a": "Dr",
    "attention.k_lora_b": "rKH",
    "attention.v_lora_a": "Dr",
    "attention.v_lora_b": "rKH",
    "attention.out_lora_a": "NHr",
    "attention.out_lora_b": "rD",
    "moe.router_lora_a": "Dr",
    "moe.router_lora_b": "re",
    "moe.gate_up_lora_a": "EDr",
    "moe.gate_up_lora_b": "ErPF",
    "moe.down_lora_a": "EFr",
    "moe.down_lora_b": "ErD",
    "head.lora_a": "Dr",
    "head.lora_b": "Vr",
}
# Predicate on the path of a parameter, such as ("blocks", "0", "moe", "router").
IsTrainable = Callable[[tuple[str, ...]], bool]
Path = Iterable[Any]  # keys of `jax.tree_util`, of any kind
Module = TypeVar("Module", bound=nnx.Module)


def sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of every letter."""
    D, E, F = config.hidden_size, config.num_local_experts, config.intermediate_size
    heads = {"N": config.num_attention_heads, "K": config.num_key_value_heads, "H": config.head_dim}
    packed = {"U": 2 * F, "O": D, "g": D // BLOCK_SIZE, "f": F // BLOCK_SIZE, "y": BLOCK_BYTES}
    return heads | packed | {"V": config.vocab_size, "D": D, "d": D, "E": E, "e": E, "P": 2, "F": F}


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter, such as `attention.q`, in one layer."""
    size, letters = sizes(config), LETTERS[name]
    target = adapted_target(name)
    if target is not None:
        size["r"] = config.lora_rank(target)
    return tuple(size[letter] for letter in letters)


def adapted_target(name: str) -> str | None:
    """Returns the LoRA target of an adapter parameter, such as "q" for `attention.q_lora_a`; None for a
    parameter of the base model."""
    module, _, field = name.rpartition(".")
    target, separator, _ = field.rpartition("lora_")
    return (target.removesuffix("_") or module) if separator else None


def normal(config: ModelConfig, name: str, rngs: nnx.Rngs) -> jax.Array:
    """Returns a normally distributed weight, float32, with the config's standard deviation."""
    return config.initializer_range * jax.random.normal(rngs.params(), shape_of(config, name), jnp.float32)


def zeros(config: ModelConfig, name: str) -> nnx.Param:
    """Returns a zero bias or sink, float32."""
    return nnx.Param(jnp.zeros(shape_of(config, name), jnp.float32))


def path_names(path: Path) -> tuple[str, ...]:
    """Returns the names in a `jax.tree_util` path, without those of nnx Variables."""
    names = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return tuple(name for name in names if name != "value")


def parameter_name(path: Path) -> str:
    """Returns the name of the parameter at the end of a path, such as `attention.q`."""
    return ".".join(path_names(path)[-2:])


def letters_of(path: Path) -> str | None:
    """Returns the letters of the parameter at the end of a path, also in optimizer state; None if it is not a
    parameter."""
    return LETTERS.get(parameter_name(path))


def is_matrix(path: Path) -> bool:
    """Returns True for a weight matrix (also stacked, packed, or of an adapter); False for a norm, bias or
    sink."""
    return bool(set("DUOr") & set(letters_of(path) or ""))


def view_layer(block: Module, index: jax.Array) -> Module:
    """Returns layer `index` of a stacked block, with matrices as LayerViews, which kernels read in place."""

    def one(path, leaf):
        view = LayerView(leaf, index)
        return view if is_matrix(path) else view.read()

    return jax.tree_util.tree_map_with_path(one, block)


def view_packed(layer: Module, block: Module, index: jax.Array) -> Module:
    """Returns a layer with its packed weights as views of `block`, the stack it is layer `index` of."""

    def one(value, stack):
        return LayerView(stack, index) if stack.dtype == jnp.uint8 else value

    return jax.tree.map(one, layer, block)


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the sharding of every leaf in a parameter tree or train state: optimizer state is sharded like
    its parameters, and everything else is replicated.

    Raises ValueError, with the valid sizes, if a mesh axis does not divide a dimension of a parameter.
    """
    axes = dict(mesh.shape)

    def sharding(path, leaf):
        letters = letters_of(path) if leaf.ndim else ""
        return NamedSharding(mesh, storage_spec(letters or "", leaf.shape, axes, parameter_name(path)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def split_params(params: dict, is_trainable: IsTrainable | None) -> tuple[dict, dict]:
    """Splits a parameter tree into (trainable, frozen); None trains all.

    Raises ValueError if no parameter is trainable.
    """
    if is_trainable is None:
        return params, {}
    flat = flatten_dict(params)
    trainable = {path: leaf for path, leaf in flat.items() if is_trainable(path)}
    if not trainable:
        raise ValueError("is_trainable selects no parameter of the model")
    return unflatten_dict(trainable), unflatten_dict({p: flat[p] for p in flat.keys() - trainable.keys()})


def merge_params(trainable: dict, frozen: dict) -> dict:
    """Inverts `split_params`."""
    return unflatten_dict(flatten_dict(trainable) | flatten_dict(frozen)) if frozen else trainable


def tree_bytes(tree: Any) -> int:
    """Returns the total bytes of all arrays in a tree, concrete or abstract, over all devices."""
    return sum(jnp.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(tree))
