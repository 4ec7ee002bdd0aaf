"""Weights: tensors in files, parameter trees, and their conversion by hand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from helpers.checkpoints import SIZES
from safetensors.numpy import load_file

from gptoss_jax.checkpoints.safetensors_io import NewTensor, write_tensors
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import bind, get_params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = ["bfloat16", "float32", "mxfp4"]
TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, 12))
LAYER_2 = "model.layers.2."


def tensors_of(folder):
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def assert_same_tensors(found, expected):
    """Asserts equal names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def leaves(tree):
    """Path -> array of a parameter tree."""
    return {".".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_leaves(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message, message
    return message


CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantized(blocks, scales):
    """Dequantizes MXFP4 weights to float32 [..., out, in]; low nibbles first."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = CODES[codes] * 2.0 ** (scales[..., None].astype(float) - 127)
    return values.reshape(*scales.shape[:-1], -1).astype(np.float32)


def block_by_hand(theirs, layer):
    """Returns a block's float32 parameters from Hugging Face tensors, without using the package."""
    D, H = SIZES["hidden_size"], SIZES["head_dim"]

    def read(name):
        return theirs[f"model.layers.{layer}.{name}"].astype(np.float32)

    def experts(name):
        if f"model.layers.{layer}.mlp.experts.{name}" in theirs:
            return read(f"mlp.experts.{name}")
        parts = (theirs[f"model.layers.{layer}.mlp.experts.{name}_{part}"] for part in ("blocks", "scales"))
        return dequantized(*parts).swapaxes(1, 2)

    found = {"attention_norm.scale": read("input_layernorm.weight")}
    for name in "qkv":
        found[f"attention.{name}"] = np.einsum(
            "nhd->dnh", read(f"self_attn.{name}_proj.weight").reshape(-1, H, D)
        )
        found[f"attention.{name}_bias"] = read(f"self_attn.{name}_proj.bias").reshape(-1, H)
    gate_up, bias = experts("gate_up_proj"), read("mlp.experts.gate_up_proj_bias")
    return found | {
        "attention.out": np.einsum("dnh->nhd", read("self_attn.o_proj.weight").reshape(D, -1, H)),
        "attention.out_bias": read("self_attn.o_proj.bias"),
        "attention.sinks": read("self_attn.sinks"),
        "moe_norm.scale": read("post_attention_layernorm.weight"),
        "moe.router": read("mlp.router.weight").T,
        "moe.router_bias": read("mlp.router.bias"),
        "moe.gate_up": np.stack([gate_up[..., 0::2], gate_up[..., 1::2]], axis=2),
        "moe.gate_up_bias": np.stack([bias[:, 0::2], bias[:, 1::2]], axis=1),
        "moe.down": experts("down_proj"),
        "moe.down_bias": read("mlp.experts.down_proj_bias"),
    }


def tree_by_hand(theirs):
    """Returns the whole tree: layers 0 and 2 are first in the period, 1 and 3 second."""
    found = {
        "embedding.weight": theirs["model.embed_tokens.weight"].astype(np.float32),
        "final_norm.scale": theirs["model.norm.weight"].astype(np.float32),
        "head.weight": theirs["lm_head.weight"].astype(np.float32),
    }
    for place in (0, 1):
        first, second = (block_by_hand(theirs, layer) for layer in (place, place + 2))
        found |= {f"blocks.{place}.{name}": np.stack([first[name], second[name]]) for name in first}
    return found


@functools.cache
def _forward(config):
    return jax.jit(lambda params, tokens: bind(config, params)(tokens))


def logits(model, tokens=TOKENS):
    return np.asarray(_forward(model.config)(get_params(model), jnp.asarray(tokens, jnp.int32)))


def warned(action):
    """Returns the result of an action, and the only warning about non-finite values that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    messages = [str(one.message) for one in caught if "finite" in str(one.message)]
    assert len(messages) == 1 and "\n" not in messages[0], [str(one.message) for one in caught]
    return result, messages[0]


# Odd sizes: in this order, every tensor but the first would be misaligned.
SHAPES = {
    "a.bytes": (np.uint8, (3,)),
    "b.wide": (np.float64, (1, 3)),
    "c.half": (np.float16, (5, 7)),
    "d.brain": (BFLOAT16, (3, 1, 11)),
    "e.single": (np.float32, (2, 9)),
    "f.bytes": (np.uint8, (7, 3)),
    "g.scalar": (np.float32, ()),
    "h.nothing": (np.float32, (0, 4)),
    "i.nothing": (np.uint8, (4, 0)),
}


def random_tensors(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: np.frombuffer(rng.bytes(np.dtype(dtype).itemsize * int(np.prod(shape))), dtype).reshape(shape)
        for name, (dtype, shape) in shapes.items()
    }


def new(name, array, parts=1):
    """Returns an array as a `NewTensor` whose rows come in `parts` chunks."""
    return NewTensor(
        name, array.dtype, array.shape, lambda: np.array_split(array, parts) if parts > 1 else [array]
    )


def write(folder, tensors, shard_bytes=10**9, **kwargs):
    folder.mkdir(exist_ok=True)
    write_tensors(folder, [new(name, array) for name, array in tensors.items()], shard_bytes, **kwargs)
    return folder


def listing(folder):
    return sorted(path.name for path in folder.iterdir())
