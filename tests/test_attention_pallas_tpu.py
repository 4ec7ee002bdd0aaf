"""Splash attention: in interpret mode against the reference, and compiled for TPUs."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tpu_compiler import needs_libtpu, on_tpus

from gptoss_jax.kernels.attention import pallas_tpu
from gptoss_jax.kernels.attention.pallas_tpu import _block_size, splash_attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention

N, K, H = 4, 2, 24
SINKS = jnp.array([-2.0, 0.5, 3.0, 1.0])


def heads(batch, length, seed):
    """Random q, k, v and output gradient, scaled so that attention weights are far from uniform."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(2 * rng.standard_normal((batch, length, n, H)), jnp.float32) for n in (N, K, K, N)]


def packed(*rows):
    """Segment ids and positions of packed rows; the last length of each is padding."""
    segments = [np.repeat([*range(1, len(row)), 0], row) for row in rows]
    positions = [np.concatenate([np.arange(n) for n in row]) for row in rows]
    return jnp.array(segments), jnp.array(positions)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(fast, window, q, k, v, d_out, segments, positions, sinks):
    spec = AttentionSpec(window)

    def attend(q, k, v, sinks):
        if fast:
            return splash_attention(q, k, v, segments, positions, spec, sinks_N=sinks, interpret=True)
        return reference_attention(q, k, v, attention_mask(segments, positions, spec), sinks_N=sinks)

    out, vjp = jax.vjp(attend, q, k, v, sinks)
    return out, *vjp(d_out)


def check(window, where, sinks=SINKS, seed=1):
    inputs = heads(*where[0].shape, seed)
    plain = with_gradients(False, window, *inputs, *where, sinks)
    fast = with_gradients(True, window, *inputs, *where, sinks)
    names = ("out", "dq", "dk", "dv", *(["ds"] if sinks is not None else []))
    for name, p, f in zip(names, plain, fast, strict=False):
        np.testing.assert_allclose(f, p, rtol=1e-5, atol=1e-5 * np.abs(p).max(), err_msg=name)
        assert np.abs(p).max() > 0.1 and f.dtype == p.dtype, name


@pytest.mark.parametrize("window", [None, 3, 128])
def test_splash_attention_matches_the_reference(window):
    # Documents that start within blocks and end at block boundaries, and padding.
    check(window, packed((40, 88, 20, 2), (3, 127, 20, 0)))


def test_without_sinks_and_padding():
    check(None, packed((128, 0)), sinks=None)


def test_several_blocks():
    # With a window, two blocks of 384; without, one block of 640. Padding is 20 and 40 rows.
    check(130, packed((600, 148, 0)))
    check(None, packed((300, 300, 0)))


@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize(("first", "end"), [(0, 200), (150, 350), (580, 830)])
def test_queries_at_an_offset_see_all_keys_before_them(monkeypatch, window, is_traced, first, end):
    # Blocks of 128 to 256 tokens. Documents span the first query or the last; some keys come after it.
    monkeypatch.setattr(pallas_tpu, "WINDOW_BLOCK", 128)
    monkeypatch.setattr(pallas_tpu, "FLOAT32_BLOCK", 256)
    segments, positions = packed((100, 500, 230, 30))
    q, k, v, d_out = heads(1, 860, 6)
    q, d_out = q[:, first:end], d_out[:, first:end]
    spec = AttentionSpec(window)
    mask = attention_mask(segments, positions, spec)[:, first:end]

    @jax.jit
    def results(offset, sinks):
        def attend(q, k, v, sinks):
            place = offset if is_traced else first
            where = (segments, positions, spec)
            return splash_attention(q, k, v, *where, sinks_N=sinks, offset=place, interpret=True)

        out, vjp = jax.vjp(attend, q, k, v, sinks)
        return out, *vjp(d_out)

    out, vjp = jax.vjp(lambda *x: reference_attention(*x[:3], mask, sinks_N=x[3]), q, k, v, SINKS)
    plain = out, *vjp(d_out)
    for name, f, p in zip(("out", "dq", "dk", "dv", "ds"), results(first, SINKS), plain, strict=True):
        np.testing.assert_allclose(f, p, rtol=1e-5, atol=1e-5 * np.abs(p).max(), err_msg=name)
        assert np.abs(p).max() > 0.1, name


def test_a_window_of_w_keys_includes_the_query():
    segments, positions = packed((260, 0))
    q, k, v, _ = heads(1, 260, 2)

    @functools.partial(jax.jit, static_argnums=0)
    def attend(window, k, v):
        spec = AttentionSpec(window)
        return splash_attention(q, k, v, segments, positions, spec, sinks_N=SINKS, interpret=True)

    for window, last in ((128, 132), (129, 133), (1, 5)):
        before = attend(window, k, v)
        after = attend(window, k.at[:, 5].add(1.0), v.at[:, 5].add(1.0))
        changed = np.flatnonzero(np.abs(np.asarray(after - before)).max(axis=(0, 2, 3)) > 0)
        np.testing.assert_array_equal(changed, np.arange(5, last + 1))


def test_blocks():
    sizes = {1: 128, 128: 128, 129: 256, 1024: 1024, 1025: 640, 4096: 1024, 4097: 896, 8192: 1024}
    assert {length: _block_size(length, None, jnp.bfloat16) for length in sizes} == sizes
    assert [_block_size(length, 128, jnp.bfloat16) for length in (100, 600, 4096)] == [128, 384, 512]
    assert _block_size(4096, None, jnp.float32) == 512


def test_bfloat16():
    # JAX's own gradient of the sinks would be bfloat16.
    where = packed((150, 0))
    inputs = [x.astype(jnp.bfloat16) for x in heads(1, 150, 3)]
    plain = with_gradients(False, 40, *[x.astype(jnp.float32) for x in inputs], *where, SINKS)
    fast = with_gradients(True, 40, *inputs, *where, SINKS)
    assert [x.dtype.name for x in fast] == 4 * ["bfloat16"] + ["float32"]
    for p, f in zip(plain, fast, strict=True):
        np.testing.assert_allclose(f.astype(jnp.float32), p, atol=0.02 * np.abs(p).max())


def test_sink_tokens_with_a_window_are_rejected():
    q, k, v, _ = heads(1, 7, 4)
    where = packed((7, 0))
    with pytest.raises(ValueError, match="sink_tokens is 4: must be 0"):
        splash_attention(q, k, v, *where, AttentionSpec(3, 4))
    out = splash_attention(q, k, v, *where, AttentionSpec(None, 4), interpret=True)
    mask = attention_mask(*where, AttentionSpec())
    np.testing.assert_allclose(out, reference_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


def precisions(jaxpr):
    """Yields the precision of every matmul in a program, inside kernels too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from precisions(inner)


def test_float32_is_multiplied_in_full_precision():
    inputs = heads(1, 7, 5)
    jaxpr = jax.make_jaxpr(with_gradients, static_argnums=(0, 1))(True, 3, *inputs, *packed((7, 0)), SINKS)
    found = list(precisions(jaxpr.jaxpr))
    assert found == [(jax.lax.Precision.HIGHEST,) * 2] * len(found) and len(found) >= 2 + 3 + 4


@needs_libtpu
def test_compiles_for_tpus():
    def both(q, k, v, segments, sinks, d_out):
        def attend(q, k, v, sinks):
            one = splash_attention(q, k, v, segments, segments, AttentionSpec(128), sinks_N=sinks)
            return one + splash_attention(one, k, v, segments, segments, AttentionSpec(), sinks_N=sinks)

        out, vjp = jax.vjp(attend, q, k, v, sinks)
        return out, *vjp(d_out)

    for dtype in (jnp.bfloat16, jnp.float32):
        shapes = [((2, 100, n, 64), dtype) for n in (N, K, K)]
        shapes += [((2, 100), jnp.int32), ((N,), jnp.float32), ((2, 100, N, 64), dtype)]
        # As the model asks for its own products; the kernels would refuse it for bfloat16.
        with jax.default_matmul_precision("highest"):
            for text in on_tpus(both, shapes):
                assert text.count('custom_call_target="tpu_custom_call"') == 6
                for kernel in ("fwd", "dq", "dkv"):
                    assert f"splash_mqa_{kernel}_segmented" in text
