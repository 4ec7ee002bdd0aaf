"""Triton attention: in interpret mode against the reference, and lowered for CUDA. Neither needs a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda_lowering import kernels_for_cuda

from gptoss_jax.kernels.attention.pallas_triton import Block, Blocks, triton_attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention

B, T, N, K, H = 3, 150, 6, 2, 24  # neither T nor H is a multiple of a block
SMALL = Blocks(Block(16, 16, 4, 2), Block(32, 16, 4, 2), Block(16, 32, 4, 2))
SINKS = jnp.array([-2.0, 0.5, 3.0, 1.0, -0.3, 5.0])


def heads(seed=0, dtype=np.float32):
    """Random q, k, v and output gradient."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(2 * rng.standard_normal((B, T, count, H)), dtype) for count in (N, K, K, N)]


def packed():
    """Segment ids and positions: documents that start within blocks and end at block boundaries, padding, and
    positions that start late or rise by one to three."""
    lengths = [(40, 24, 80, 6), (3, 100, 47, 0), (90, 22, 38, 0)]
    segments = np.array([np.repeat([1, 2, 3, 0], row) for row in lengths])
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    positions[1] += 5000
    steps = np.random.default_rng(1).integers(1, 4, T)
    for document in (1, 2, 3):
        at = segments[2] == document
        positions[2, at] = np.cumsum(steps[at]) - steps[at][0]
    return jnp.array(segments), jnp.array(positions)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(fast, spec, inputs, d_out, segments, positions):
    def attend(q, k, v, sinks=None):
        if fast:
            settings = {"interpret": True, "blocks": SMALL}
            return triton_attention(q, k, v, segments, positions, spec, sinks_N=sinks, **settings)
        return reference_attention(q, k, v, attention_mask(segments, positions, spec), sinks_N=sinks)

    out, vjp = jax.vjp(attend, *inputs)
    return out, *vjp(d_out)


NAMES = ("out", "dq", "dk", "dv", "ds")


@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("window", [None, 1, 5, 70])
def test_kernels_match_the_reference(window, sink_tokens):
    *inputs, d_out = heads()
    inputs = (*inputs, SINKS)
    plain = with_gradients(False, AttentionSpec(window, sink_tokens), inputs, d_out, *packed())
    fast = with_gradients(True, AttentionSpec(window, sink_tokens), inputs, d_out, *packed())
    for name, p, f in zip(NAMES, plain, fast, strict=True):
        assert np.abs(f - p).max() < 1e-5 * np.abs(p).max(), name


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(5), AttentionSpec(70, 2)], ids=str)
def test_queries_at_an_offset_see_all_keys_before_them(spec):
    *inputs, d_out = heads(seed=8)
    segments, positions = packed()
    mask = attention_mask(segments, positions, spec)

    @functools.partial(jax.jit, static_argnums=0)
    def results(size, first, q, k, v, d_out):
        def attend(q, k, v, sinks):
            settings = {"interpret": True, "blocks": SMALL, "offset": first}
            return triton_attention(q, k, v, segments, positions, spec, sinks_N=sinks, **settings)

        q, d_out = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (q, d_out))
        out, vjp = jax.vjp(attend, q, k, v, SINKS)
        return out, *vjp(d_out)

    # Queries whose number is no multiple of a block, and keys after them.
    for first in (0, 37, 98):
        queries = slice(first, first + 52)

        def plain(q, k, v, sinks, queries=queries):
            return reference_attention(q, k, v, mask[:, queries], sinks_N=sinks)

        out, vjp = jax.vjp(plain, inputs[0][:, queries], *inputs[1:], SINKS)
        expected = out, *vjp(d_out[:, queries])
        for name, f, p in zip(NAMES, results(52, first, *inputs, d_out), expected, strict=True):
            assert np.abs(f - p).max() < 1e-5 * np.abs(p).max(), name


@pytest.mark.parametrize("window, sink_tokens", [(None, 0), (5, 2)])
def test_without_learned_sinks(window, sink_tokens):
    *inputs, d_out = heads(seed=2)
    plain = with_gradients(False, AttentionSpec(window, sink_tokens), tuple(inputs), d_out, *packed())
    fast = with_gradients(True, AttentionSpec(window, sink_tokens), tuple(inputs), d_out, *packed())
    for name, p, f in zip(NAMES[:4], plain, fast, strict=True):
        assert np.abs(f - p).max() < 1e-5 * np.abs(p).max(), name


def test_narrow_dtypes_are_kept_and_close_to_float32():
    *inputs, d_out = heads(seed=3, dtype=jnp.bfloat16)
    inputs = (*inputs, SINKS.astype(jnp.bfloat16))
    fast = with_gradients(True, AttentionSpec(5, 2), inputs, d_out, *packed())
    wide = [x.astype(jnp.float32) for x in (*inputs, d_out)]
    plain = with_gradients(False, AttentionSpec(5, 2), tuple(wide[:4]), wide[4], *packed())
    for name, p, f in zip(NAMES, plain, fast, strict=True):
        assert f.dtype == jnp.bfloat16, name
        assert np.abs(f.astype(jnp.float32) - p).max() < 2e-2 * np.abs(p).max(), name


def in_order(spoilt=slice(0)):
    """One document whose q, k, v and output gradient are NaN at some tokens."""
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    arrays = [x.at[:, spoilt].set(jnp.nan) for x in heads(seed=4)]
    return arrays[:3], arrays[3], jnp.ones_like(positions), positions


def finite_tokens(window, sink_tokens, spoilt):
    """Returns the tokens with finite out, dq, dk and dv when the tokens of `spoilt` are NaN: whatever is read
    becomes NaN, even with weight zero."""
    inputs, d_out, *where = in_order(spoilt)
    results = with_gradients(True, AttentionSpec(window, sink_tokens), (*inputs, SINKS), d_out, *where)[:4]
    return [np.flatnonzero(np.isfinite(x).all(axis=(0, 2, 3))).tolist() for x in results]


def test_blocks_outside_the_window_are_not_read():
    # Blocks of 16 keys; blocks of 16 or 32 rows hold the queries of 3 heads: 6 to 12 tokens.
    out, dq, dk, dv = finite_tokens(5, 0, slice(64, 80))
    assert set(out) >= {*range(60), *range(90, T)}
    assert set(dq) >= {*range(54), *range(96, T)}
    assert set(dk) & set(dv) >= {*range(32), *range(96, T)}
    # In full layers later queries read them, but earlier ones still do not.
    assert finite_tokens(None, 0, slice(64, 80))[0] == [*range(64)]
    # The gradients of the first tokens and of their block of 32 keys depend on all queries.
    out, _, dk, dv = finite_tokens(5, 2, slice(64, 80))
    assert set(out) >= {*range(60), *range(90, T)}
    assert dk == dv == [*range(96, T)]


def test_blocks_of_other_documents_are_not_read():
    (q, k, v), _, _, positions = in_order(slice(0, 48))
    segments = jnp.where(positions < 48, 1, 2)
    out = triton_attention(
        q, k, v, segments, positions, AttentionSpec(), sinks_N=SINKS, interpret=True, blocks=SMALL
    )
    assert np.isfinite(out[:, 48:]).all() and np.isnan(out[:, :48]).all()


def test_padding_with_constant_positions():
    # Padding from packing has segment 0 and position 0. It does not affect the documents' results.
    inputs, d_out, segments, positions = in_order()
    kept = jnp.arange(T) < 100
    d_kept, spec = d_out * kept[:, None, None], AttentionSpec(5, 2)
    found = with_gradients(True, spec, (*inputs, SINKS), d_kept, segments * kept, positions * kept)
    short = [x[:, :100] for x in (*inputs, d_out, segments, positions)]
    alone = with_gradients(True, AttentionSpec(5, 2), (*short[:3], SINKS), *short[3:])
    for name, f, a in zip(NAMES, found, alone, strict=True):
        assert np.isfinite(f).all(), name
        f = f if name == "ds" else f[:, :100]
        np.testing.assert_allclose(f, a, rtol=1e-5, atol=1e-5, err_msg=name)


def training_step(dtype, window, length=1024):
    """Returns the forward and backward pass, and the shapes of its arguments."""
    shape = {count: jax.ShapeDtypeStruct((2, length, count, 64), dtype) for count in (8, 2)}
    where = jax.ShapeDtypeStruct((2, length), jnp.int32)
    sinks = jax.ShapeDtypeStruct((8,), dtype)

    def forward_and_backward(q, k, v, sinks, segments, positions, d_out):
        def attend(q, k, v, sinks):
            return triton_attention(q, k, v, segments, positions, AttentionSpec(window), sinks_N=sinks)

        out, vjp = jax.vjp(attend, q, k, v, sinks)
        return out, *vjp(d_out)

    return forward_and_backward, (shape[8], shape[2], shape[2], sinks, where, where, shape[8])


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_cuda(dtype, window):
    function, shapes = training_step(dtype, window)
    kernels = kernels_for_cuda(function, *shapes)
    assert [kernel.count("tt.dot") for kernel in kernels] == [2, 3, 4]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("window", [None, 128])
def test_no_score_matrix_is_stored_and_matmuls_have_full_precision(window):
    products = 0
    function, shapes = training_step(jnp.float32, window)
    for equation in equations(jax.make_jaxpr(function)(*shapes).jaxpr):
        for variable in (*equation.invars, *equation.outvars):
            assert sum(size >= 1024 for size in variable.aval.shape) <= 1, equation
        if equation.primitive.name == "dot_general":
            products += 1
            assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert products == 2 + 3 + 4
