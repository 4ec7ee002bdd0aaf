"""Parameter trees: random ones, packed experts unpacked, and comparisons."""

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.model.parameters import path_names
from gptoss_jax.model.transformer import abstract_params


def random_params(config, spread_of, seed=0):
    """Returns random parameters, those of adapters too, as NumPy arrays: normal with the spread of a name,
    around 1 for scales of norms. Scales of packed experts are 2^-6 to 2^-4."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = path_names(path)[-1]
        if leaf.dtype == jnp.uint8:
            low, high = (0, 256) if name.endswith("blocks") else (121, 124)
            return rng.integers(low, high, leaf.shape, np.uint8)
        return ((name == "scale") + spread_of(name) * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config))


def unpacked(params):
    """Returns the parameters with experts that are not packed."""
    blocks = {}
    for i, block in params["blocks"].items():
        moe = dict(block["moe"])
        for name in ("gate_up", "down"):
            moe[name] = codec.dequantize(moe.pop(f"{name}_blocks"), moe.pop(f"{name}_scales"), jnp.float32)
        L, E, U, D = moe["gate_up"].shape
        moe["gate_up"] = moe["gate_up"].reshape(L, E, U // 2, 2, D).transpose(0, 1, 4, 3, 2)
        moe["down"] = moe["down"].swapaxes(2, 3)
        blocks[i] = block | {"moe": moe}
    return params | {"blocks": blocks}


def assert_close(found, expected, tolerance=1e-5):
    """Asserts that leaves differ by at most a part of their largest value, which is not 0."""
    for (path, f), e in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(e).max()
        assert scale > 0, path
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * scale, err_msg=str(path))
