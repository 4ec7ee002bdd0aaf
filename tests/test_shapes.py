"""Shape assertions by letters."""

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.kernels.shapes import assert_shapes


def test_sizes_by_letter():
    q_BTNH, k_BSKH = jnp.zeros((2, 3, 4, 5)), jax.ShapeDtypeStruct((2, 7, 1, 5), jnp.bfloat16)
    dims = assert_shapes("BTNH BSKH N BS1H", q_BTNH, k_BSKH, None, k_BSKH)
    assert (dims.B, dims.T, dims.N, dims.H, dims.S, dims.K) == (2, 3, 4, 5, 7, 1)


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ("BTD BSD", r"the shape \(2, 4, 6\) is not BSD with B=2, T=3, D=5"),
        ("BTD BTS", r"the shape \(2, 4, 6\) is not BTS with B=2, T=3, D=5"),
        ("BTD BS", r"the shape \(2, 4, 6\) is not BS with B=2, T=3, D=5"),
        ("BTD BSDH", r"the shape \(2, 4, 6\) is not BSDH with"),
        ("BTT BSD", r"the shape \(2, 3, 5\) is not BTT"),
        ("B3D 14H", r"the shape \(2, 4, 6\) is not 14H"),
    ],
)
def test_errors_name_letters_and_sizes(letters, message):
    with pytest.raises(AssertionError, match=message):
        assert_shapes(letters, jnp.zeros((2, 3, 5)), jnp.zeros((2, 4, 6)))


def test_shapes_are_checked_while_tracing():
    @jax.jit
    def matmul(x_MD, w_DF):
        assert_shapes("MD DF", x_MD, w_DF)
        return x_MD @ w_DF

    assert matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)
    with pytest.raises(AssertionError, match=r"the shape \(4, 3\) is not DF with M=2, D=3"):
        matmul(jnp.ones((2, 3)), jnp.ones((4, 3)))
