"""The attention mask, grouped heads, learned sinks, and the XLA implementations against the reference."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.kernels.attention.api import attention, query_chunked_attention
from gptoss_jax.kernels.attention.blockwise import blockwise_attention
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention

B, N, K, H = 2, 6, 2, 5
G = N // K
T = 150  # three blocks of queries, the last with 22


def heads(length, seed=0, dtype=np.float32):
    """Random q, k, v of the same length, scaled so that attention weights are far from uniform."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(2 * rng.standard_normal((B, length, count, H)), dtype) for count in (N, K, K)]


def in_order(length):
    """Segment ids and positions of one document."""
    positions = jnp.broadcast_to(jnp.arange(length), (B, length))
    return jnp.ones_like(positions), positions


SINKS = jnp.array([-2.0, 0.5, 3.0, 1.0, -0.3, 5.0])


def reference(q, k, v, segments, positions, spec, *, sinks_N):
    """`reference_attention` with the signature of the implementations."""
    return reference_attention(q, k, v, attention_mask(segments, positions, spec), sinks_N=sinks_N)


def of_one_document(attend):
    return jax.jit(
        lambda q, k, v, spec: attend(q, k, v, *in_order(q.shape[1]), spec, sinks_N=SINKS), static_argnums=3
    )


by_reference, by_chunks = of_one_document(reference), of_one_document(query_chunked_attention)
by_blocks = of_one_document(functools.partial(blockwise_attention, block=64))


def test_mask_by_hand():
    positions, segments = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)
    causal = np.tril(np.ones((6, 6), int))
    np.testing.assert_array_equal(attention_mask(segments, positions, AttentionSpec())[0], causal)
    windowed = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    np.testing.assert_array_equal(attention_mask(segments, positions, AttentionSpec(3))[0], windowed)
    with_first = np.array(windowed)
    with_first[:, 0] = 1
    with_first[1:, 1] = 1
    np.testing.assert_array_equal(attention_mask(segments, positions, AttentionSpec(3, 2))[0], with_first)
    # Full layers do not need sink tokens.
    assert AttentionSpec(None, 2) == AttentionSpec()
    np.testing.assert_array_equal(attention_mask(segments, positions, AttentionSpec(None, 2))[0], causal)


def test_mask_of_a_packed_row_by_hand():
    # Two documents and padding. Each starts at position 0, so each has its own sink token.
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    mask = attention_mask(segments, positions, AttentionSpec(2, 1))
    np.testing.assert_array_equal(
        mask[0].astype(int),
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 0, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 1],
        ],
    )


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.lists(st.integers(1, 3), min_size=9, max_size=9),
    window=st.none() | st.integers(1, 9),
    sink_tokens=st.integers(0, 4),
)
def test_mask_matches_its_definition(lengths, steps, window, sink_tokens):
    row = [segment for segment, length in enumerate(lengths, 1) for _ in range(length)][:9]
    row += [0] * (9 - len(row))
    positions = []
    for t, segment in enumerate(row):
        new = t == 0 or row[t - 1] != segment
        positions.append(0 if new else positions[-1] + steps[t])
    segments_BT, positions_BT = jnp.array([row]), jnp.array([positions])
    mask = np.asarray(attention_mask(segments_BT, positions_BT, AttentionSpec(window, sink_tokens)))
    for i in range(9):
        for j in range(9):
            expected = row[i] == row[j] and positions[j] <= positions[i]
            if window is not None:
                expected &= positions[i] - window < positions[j] or positions[j] < sink_tokens
            assert mask[0, i, j] == expected, (i, j)


def queries_that_change(attend, spec, key, length=11):
    """Returns the queries whose results change when one key and its value change."""
    q, k, v = heads(length)
    before = attend(q, k, v, spec)
    after = attend(q, k.at[:, key].add(1.0), v.at[:, key].add(1.0), spec)
    changed = np.abs(np.asarray(after - before)).max(axis=(0, 2, 3)) > 0
    return np.flatnonzero(changed).tolist()


@pytest.mark.parametrize("attend", [by_reference, by_chunks, by_blocks])
def test_a_window_of_w_keys_includes_the_query(attend):
    assert queries_that_change(attend, AttentionSpec(4), 0) == [0, 1, 2, 3]
    assert queries_that_change(attend, AttentionSpec(4), 5) == [5, 6, 7, 8]
    assert queries_that_change(attend, AttentionSpec(4), 9) == [9, 10]
    assert queries_that_change(attend, AttentionSpec(1), 6) == [6]
    assert queries_that_change(attend, AttentionSpec(), 6) == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("attend", [by_reference, by_chunks, by_blocks])
def test_sink_tokens_stay_visible(attend):
    assert queries_that_change(attend, AttentionSpec(3, 2), 0) == list(range(11))
    assert queries_that_change(attend, AttentionSpec(3, 2), 1) == list(range(1, 11))
    assert queries_that_change(attend, AttentionSpec(3, 2), 2) == [2, 3, 4]


@pytest.mark.parametrize("attend", [by_chunks, by_blocks])
def test_window_edge_across_blocks(attend):
    # The window crosses the boundary between the first and second block of 64 queries.
    assert queries_that_change(attend, AttentionSpec(70), 3, length=T) == list(range(3, 73))
    # 60 is the earliest key that the second block's first query sees.
    assert queries_that_change(attend, AttentionSpec(5), 60, length=T) == [60, 61, 62, 63, 64]
    assert queries_that_change(attend, AttentionSpec(5), 59, length=T) == [59, 60, 61, 62, 63]
    assert queries_that_change(attend, AttentionSpec(5, 1), 0, length=T) == list(range(T))


def test_query_head_n_attends_with_key_head_n_over_g():
    q, k, v = heads(7)
    before = by_reference(q, k, v, AttentionSpec())
    for moved in (k.at[:, :, 1].mul(-1), v), (k, v.at[:, :, 1].add(1.0)):
        after = by_reference(q, *moved, AttentionSpec())
        changed = np.abs(np.asarray(after - before)).max(axis=(0, 1, 3)) > 0
        np.testing.assert_array_equal(changed, [False, False, False, True, True, True])


def test_attention_to_two_keys_by_hand():
    # Scores ln 3 and ln 1, sink ln 2: weights 3/6 and 1/6.
    q = jnp.array([1.0]).reshape(1, 1, 1, 1)
    k = jnp.log(jnp.array([3.0, 1.0])).reshape(1, 2, 1, 1)
    v = jnp.array([10.0, 1.0]).reshape(1, 2, 1, 1)
    mask = jnp.ones((1, 1, 2), bool)
    out = reference_attention(q, k, v, mask, sinks_N=jnp.log(jnp.array([2.0])))
    assert float(out[0, 0, 0, 0]) == pytest.approx(10 * 3 / 6 + 1 / 6, rel=1e-6)
    out = reference_attention(q, k, v, mask)
    assert float(out[0, 0, 0, 0]) == pytest.approx(10 * 3 / 4 + 1 / 4, rel=1e-6)
    # The scores are scaled, halved for head size 4; the sink is not.
    out = reference_attention(
        jnp.full((1, 1, 1, 4), 0.5), jnp.repeat(k, 4, axis=3), jnp.repeat(v, 4, axis=3), mask,
        sinks_N=jnp.log(jnp.array([2.0])),
    )  # fmt: skip
    assert float(out[0, 0, 0, 0]) == pytest.approx(10 * 3 / 6 + 1 / 6, rel=1e-6)


def test_very_large_sinks_and_scores_give_no_nan():
    q, k, v = heads(4)
    segments, positions = in_order(4)
    mask = attention_mask(segments, positions, AttentionSpec())
    out = reference_attention(q, k, v, mask, sinks_N=jnp.full(N, 1e4))
    np.testing.assert_array_equal(out, 0)
    out = reference_attention(1e3 * q, 1e3 * k, v, mask, sinks_N=SINKS)
    assert np.isfinite(out).all()
    assert np.isfinite(reference_attention(q, k, v, jnp.zeros_like(mask), sinks_N=SINKS)).all()


def by_the_formulas(q, k, v, sinks, d_out, mask):
    """docs/math.md, "Forward pass", in NumPy: the result and the fused backward pass, one head at a time."""
    out, dq, dk, dv, ds = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(N)
    for b in range(B):
        for n in range(N):
            kv = n // G
            scores = q[b, :, n] @ k[b, :, kv].T / np.sqrt(H)
            scores = np.where(mask[b], scores, -np.inf)
            lse = np.log(np.exp(scores).sum(axis=1))
            plain = np.exp(scores - lse[:, None]) @ v[b, :, kv]
            # The sink identity.
            out[b, :, n] = plain / (1 + np.exp(sinks[n] - lse))[:, None]
            # The usual backward pass of flash attention, with a logsumexp that includes the sink.
            lse = np.logaddexp(lse, sinks[n])
            p = np.exp(scores - lse[:, None])
            delta = (d_out[b, :, n] * out[b, :, n]).sum(axis=1)
            d_scores = p * (d_out[b, :, n] @ v[b, :, kv].T - delta[:, None])
            dq[b, :, n] = d_scores @ k[b, :, kv] / np.sqrt(H)
            dk[b, :, kv] += d_scores.T @ q[b, :, n] / np.sqrt(H)
            dv[b, :, kv] += p.T @ d_out[b, :, n]
            ds[n] -= (np.exp(sinks[n] - lse) * delta).sum()
    return out, dq, dk, dv, ds


@pytest.mark.parametrize("window", [None, 4])
def test_sink_identity_and_backward_formulas(window):
    rng = np.random.default_rng(3)
    with jax.enable_x64():
        q, k, v = heads(11, seed=4, dtype=np.float64)
        segments, positions = in_order(11)
        mask = attention_mask(segments, positions, AttentionSpec(window))
        sinks = jnp.asarray(SINKS, jnp.float64)
        d_out = rng.standard_normal(q.shape)

        @jax.jit
        def attend(d_out, *inputs):
            out, vjp = jax.vjp(lambda q, k, v, s: reference_attention(q, k, v, mask, sinks_N=s), *inputs)
            return out, *vjp(d_out)

        found = attend(jnp.asarray(d_out), q, k, v, sinks)
        assert found[0].dtype == jnp.float64
    expected = by_the_formulas(*(np.asarray(x) for x in (q, k, v, sinks)), d_out, np.asarray(mask))
    for name, f, e in zip(("out", "dq", "dk", "dv", "ds"), found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-9, atol=1e-11, err_msg=name)


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(attend, spec, inputs, d_out, segments, positions):
    *qkv, sinks = inputs
    out, vjp = jax.vjp(lambda *a: attend(*a[:3], segments, positions, spec, sinks_N=a[3]), *qkv, sinks)
    return out, *vjp(d_out)


# Blocks of 38 tokens, the last one padded; windows reach into one or two earlier blocks.
IMPLEMENTATIONS = {
    "chunks": query_chunked_attention,
    "blocks": functools.partial(blockwise_attention, block=40),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_implementations_match_the_reference(name, window, sink_tokens):
    inputs = (*heads(T, seed=5), SINKS)
    d_out = jnp.asarray(np.random.default_rng(6).standard_normal((B, T, N, H)), jnp.float32)
    one_document = in_order(T)
    # Documents that start within blocks and end at block boundaries, and padding.
    lengths = [(40, 24, 80, 6), (3, 100, 47, 0)]
    segments = jnp.array([np.repeat([1, 2, 3, 0], row) for row in lengths])
    positions = jnp.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    spec = AttentionSpec(window, sink_tokens)
    # Positions may start anywhere, as in a document that continues from another row, without sink tokens.
    for where in (one_document, (segments, positions), (segments, positions + 5000)):
        plain = with_gradients(reference, spec, inputs, d_out, *where)
        fast = with_gradients(IMPLEMENTATIONS[name], spec, inputs, d_out, *where)
        for array, p, f in zip(("out", "dq", "dk", "dv", "ds"), plain, fast, strict=True):
            np.testing.assert_allclose(f, p, rtol=0, atol=1e-5 * np.abs(p).max(), err_msg=array)
            assert np.abs(p).max() > 0.1, array


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(5), AttentionSpec(70, 2)], ids=str)
def test_blocks_of_queries_at_an_offset_see_all_keys_before_them(spec):
    *qkv, d_out = *heads(T, seed=5), jnp.asarray(np.random.default_rng(6).standard_normal((B, T, N, H)))
    lengths = [(40, 24, 80, 6), (3, 100, 47, 0)]
    segments = jnp.array([np.repeat([1, 2, 3, 0], row) for row in lengths])
    positions = jnp.array([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    mask = attention_mask(segments, positions, spec)

    @jax.jit
    def results(first, q, d_out):
        def attend(q, k, v, sinks):
            where = segments, positions, spec
            return blockwise_attention(q, k, v, *where, sinks_N=sinks, offset=first, block=40)

        out, vjp = jax.vjp(attend, q, *qkv[1:], SINKS)
        return out, *vjp(d_out.astype(out.dtype))

    for first in (0, 37, 98):
        queries = slice(first, first + 52)

        def plain(q, k, v, sinks, queries=queries):
            return reference_attention(q, k, v, mask[:, queries], sinks_N=sinks)

        out, vjp = jax.vjp(plain, qkv[0][:, queries], *qkv[1:], SINKS)
        expected = out, *vjp(d_out[:, queries].astype(out.dtype))
        found = results(first, qkv[0][:, queries], d_out[:, queries])
        for array, p, f in zip(("out", "dq", "dk", "dv", "ds"), expected, found, strict=True):
            np.testing.assert_allclose(f, p, rtol=0, atol=1e-5 * np.abs(p).max(), err_msg=array)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_other_documents_are_not_attended_to(name):
    q, k, v = heads(T, seed=7)
    segments = jnp.broadcast_to(jnp.where(jnp.arange(T) < 61, 1, 2), (B, T))
    positions = jnp.broadcast_to(jnp.where(jnp.arange(T) < 61, jnp.arange(T), jnp.arange(T) - 61), (B, T))
    attend = jax.jit(
        lambda q, k, v: IMPLEMENTATIONS[name](q, k, v, segments, positions, AttentionSpec(), sinks_N=SINKS)
    )
    before = np.asarray(attend(q, k, v))
    after = np.asarray(attend(q.at[:, :61].add(1), k.at[:, :61].add(1), v.at[:, :61].add(1)))
    np.testing.assert_array_equal(before[:, 61:], after[:, 61:])
    assert (before[:, :61] != after[:, :61]).any()


def test_dropout_keeps_the_mean_and_the_weight_of_the_sinks():
    q, k, v = heads(3, seed=8)
    mask = attention_mask(*in_order(3), AttentionSpec())
    keys = jax.random.split(jax.random.key(0), 20_000)
    drop = jax.jit(
        jax.vmap(lambda key: reference_attention(q, k, v, mask, sinks_N=SINKS, dropout=0.4, dropout_key=key))
    )
    dropped = np.asarray(drop(keys))
    plain = np.asarray(reference_attention(q, k, v, mask, sinks_N=SINKS))
    np.testing.assert_allclose(dropped.mean(axis=0), plain, atol=0.06)
    # The first query sees one key, which is either kept and scaled up, or dropped.
    first = dropped[:, 0, 0, 0]
    kept = np.abs(first).max(axis=-1) > 0
    assert abs(kept.mean() - 0.6) < 0.02
    np.testing.assert_allclose(
        first[kept], np.broadcast_to(plain[0, 0, 0] / 0.6, first[kept].shape), rtol=1e-5
    )


def test_blocks_drop_the_same_weights_in_forward_and_backward():
    """With a fixed random key, the output is linear in the values: the outputs determine the gradient."""
    q, k, v = heads(T, seed=9)
    other, d_out = heads(T, seed=10)[2], heads(T, seed=11)[0]
    key = jax.random.key(3)

    @jax.jit
    def attend(v, q, key):
        spec = AttentionSpec(70, 2, dropout=0.3)
        return IMPLEMENTATIONS["blocks"](q, k, v, *in_order(T), spec, sinks_N=SINKS, dropout_key=key)

    @jax.jit
    def gradients(v, q, d_out):
        return jax.vjp(lambda v, q: attend(v, q, key), v, q)[1](d_out)

    dv, dq = gradients(v, q, d_out)
    np.testing.assert_allclose(jnp.vdot(dv, other), jnp.vdot(d_out, attend(other, q, key)), rtol=1e-4)
    # A finite difference along a direction of q agrees with the gradient.
    step = heads(T, seed=12)[0]
    difference = (attend(v, q + 1e-3 * step, key) - attend(v, q - 1e-3 * step, key)) / 2e-3
    np.testing.assert_allclose(jnp.vdot(dq, step), jnp.vdot(d_out, difference), rtol=2e-3)
    plain = by_blocks(q, k, v, AttentionSpec(70, 2))
    dropped = jnp.stack([attend(v, q, jax.random.key(i)) for i in range(8)])
    assert np.abs(dropped - plain).max() > 0.1
    assert abs(float(jnp.vdot(dropped.mean(0), plain) / jnp.vdot(plain, plain)) - 1) < 0.05


@pytest.mark.parametrize("attend", [attention, blockwise_attention])
@pytest.mark.parametrize("window", [None, 128])
def test_no_array_has_the_shape_t_by_t(window, attend):
    length = 2048
    shape = jax.ShapeDtypeStruct
    inputs = [shape((1, length, n, H), jnp.float32) for n in (N, K, K)] + [shape((N,), jnp.float32)]
    positions = jnp.broadcast_to(jnp.arange(length), (1, length))

    def loss(q, k, v, sinks):
        spec = AttentionSpec(window)
        return jnp.sum(attend(q, k, v, jnp.ones_like(positions), positions, spec, sinks_N=sinks) ** 2)

    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*inputs).as_text()
    sizes = [[int(n) for n in found.split("x")[:-1]] for found in re.findall(r"tensor<([0-9x]+x)f32>", text)]
    assert any(size.count(length) == 1 for size in sizes)
    assert not any(sum(n >= length for n in size) > 1 for size in sizes)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = heads(7)
    with pytest.raises(AssertionError, match=r"\(2, 6, 2, 5\) is not BTKH with B=2, T=7, N=6, H=5, K=2"):
        attention(q, k, v[:, 1:], *in_order(7), AttentionSpec())
