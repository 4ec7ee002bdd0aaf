"""Every parameter, declared once: its dimensions by letter.

Initialization, sharding (`parallel/rules.py`), weight decay and Muon's dimensions follow from the letters.
Arrays of rank two and more carry theirs as a suffix (`q_BTNH`). The key, unless a file has its own: B batch,
T query length, S key length, D hidden, N query heads, K key/value heads, G = N / K, H head size, E experts,
X experts per token, F expert width, P = 2 (gate and up), V vocabulary, L layers, W window, M = B T tokens,
R rows sorted by expert, C chunk. Packed in MXFP4: U = 2 F rows of gate and up, O = D rows of down, each of
g = D / 32 or f = F / 32 blocks of y = 16 bytes. Lower-case dimensions are never split.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.kernels.mxfp4.codec import BLOCK_BYTES, BLOCK_SIZE
from gptoss_jax.parallel.rules import storage_spec

# The last two names of a parameter's path -> its letters, without the leading dimension of stacked layers.
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
    # Each block of 32 input values has a scale. Rows of gate and up alternate.
    "moe.gate_up_blocks": "EUgy",
    "moe.gate_up_scales": "EUg",
    "moe.down_blocks": "EOfy",
    "moe.down_scales": "EOf",
    "final_norm.scale": "d",
}


def sizes(config: ModelConfig) -> dict[str, int]:
    """Returns the size of every letter."""
    D, E, F = config.hidden_size, config.num_local_experts, config.intermediate_size
    heads = {"N": config.num_attention_heads, "K": config.num_key_value_heads, "H": config.head_dim}
    packed = {"U": 2 * F, "O": D, "g": D // BLOCK_SIZE, "f": F // BLOCK_SIZE, "y": BLOCK_BYTES}
    return heads | packed | {"V": config.vocab_size, "D": D, "d": D, "E": E, "e": E, "P": 2, "F": F}


def shape_of(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Returns the shape of one layer's parameter, such as `attention.q`."""
    size = sizes(config)
    return tuple(size[letter] for letter in LETTERS[name])


def normal(config: ModelConfig, name: str, rngs: nnx.Rngs) -> jax.Array:
    """Returns a random weight, float32, with the config's standard deviation."""
    return config.initializer_range * jax.random.normal(rngs.params(), shape_of(config, name), jnp.float32)


def zeros(config: ModelConfig, name: str) -> nnx.Param:
    """Returns a bias or sink of zeros, float32."""
    return nnx.Param(jnp.zeros(shape_of(config, name), jnp.float32))


def path_names(path) -> tuple[str, ...]:
    """Returns the names along a path of `jax.tree_util`, without those of nnx Variables."""
    names = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return tuple(name for name in names if name != "value")


def parameter_name(path) -> str:
    """Returns the name of the parameter at the end of a path, such as `attention.q`."""
    return ".".join(path_names(path)[-2:])


def letters_of(path) -> str | None:
    """Returns the letters of the parameter at the end of a path, also in an optimizer's state; None if it
    isn't a parameter."""
    return LETTERS.get(parameter_name(path))


def is_matrix(path) -> bool:
    """Returns True for a weight matrix, stacked or packed; False for a norm, bias or sink."""
    return bool(set("DUO") & set(letters_of(path) or ""))


def view_layer(block: nnx.Module, index: jax.Array) -> nnx.Module:
    """Returns layer `index` of a stacked block, with matrices as LayerViews, which are read in place."""

    def one(path, leaf):
        view = LayerView(leaf, index)
        return view if is_matrix(path) else view.read()

    return jax.tree_util.tree_map_with_path(one, block)


def parameter_shardings(tree, mesh: Mesh):
    """Returns the sharding of every leaf of a parameter tree or train state: an optimizer's state is split
    like its parameters, and everything else is replicated.

    Raises ValueError, with the valid sizes, if the mesh does not divide a parameter.
    """
    axes = dict(mesh.shape)

    def sharding(path, leaf):
        letters = letters_of(path) if leaf.ndim else ""
        return NamedSharding(mesh, storage_spec(letters or "", leaf.shape, axes, parameter_name(path)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def tree_bytes(tree) -> int:
    """Returns the bytes of all arrays of a tree, abstract or real, summed over devices."""
    return sum(jnp.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(tree))
