"""Losses: chunked cross-entropy against the plain one, and values by hand."""

import contextlib
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import MeshConfig
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.training import losses

B, T, D, V = 2, 12, 5, 31


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, T, D), (V, D)))
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 2.0, (B, T)) * (rng.random((B, T)) < 0.7), jnp.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights):
    log_p = jax.nn.log_softmax(hidden @ head.T, axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


def value_and_gradients(f, hidden, head):
    return jax.tree.leaves(jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, head))


@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_chunked_loss_matches_the_plain_loss(chunk):
    hidden, head, targets, weights = inputs()
    expected = value_and_gradients(lambda h, w: 3 * plain(h, w, targets, weights), hidden, head)
    found = value_and_gradients(
        lambda h, w: 3 * losses.cross_entropy((h,), (w,), targets, weights, chunk), hidden, head
    )
    alone = losses.cross_entropy((hidden,), (head,), targets, weights, chunk)
    assert alone.dtype == jnp.float32 and alone.shape == ()
    np.testing.assert_allclose(3 * alone, expected[0], rtol=1e-6)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5)


def test_by_hand():
    # Logits 0 and ln 3: -log p is ln 4 for the first and ln(4/3) for the second.
    hidden, head = jnp.ones((1, 2, 1)), jnp.array([[0.0], [math.log(3)]])
    loss = losses.cross_entropy((hidden,), (head,), jnp.array([[0, 1]]), jnp.array([[1.0, 10.0]]), 1)
    assert float(loss) == pytest.approx(math.log(4) + 10 * math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_targets_of_weight_zero_have_no_effect(content):
    hidden, head, targets, weights = inputs(1)
    off = weights == 0
    assert 0 < int(off.sum()) < B * T
    spoilt = jnp.where(off[..., None], content, hidden)

    def loss(hidden, targets):
        return value_and_gradients(
            lambda h, w: losses.cross_entropy((h,), (w,), targets, weights, 4), hidden, head
        )

    expected = loss(hidden, targets)
    # An id outside the vocabulary, which some pipelines use for targets to ignore.
    for f, e in zip(loss(spoilt, jnp.where(off, -100, targets)), expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_chunks_without_a_weight_are_skipped(sharded, monkeypatch):
    """Row 0 has 5 weights and row 1 has 2: with chunks of 2 positions, three chunks of six are needed."""
    hidden, head, targets, _ = inputs(3)
    weights = np.zeros((B, T), np.float32)
    weights[0, [1, 2, 6, 9, 11]], weights[1, [4, 8]] = [1.0, 0.5, 2.0, 0.25, 1.5], [3.0, 0.75]
    expected = value_and_gradients(lambda h, w: plain(h, w, targets, weights), hidden, head)
    calls, cond = [], jax.lax.cond

    def counting_cond(needed, compute, skip, *operands):
        def counted(*operands):
            jax.debug.callback(lambda: calls.append(1))
            return compute(*operands)

        return cond(needed, counted, skip, *operands)

    monkeypatch.setattr(jax.lax, "cond", counting_cond)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2]) if sharded else None
    with jax.set_mesh(mesh) if sharded else contextlib.nullcontext():
        found = value_and_gradients(
            lambda h, w: losses.cross_entropy((h,), (w,), targets, weights, 2), hidden, head
        )
    jax.effects_barrier()
    # With a row on each device, both compute the chunks that either needs.
    assert len(calls) == (6 if sharded else 3)
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5)


def test_weights_may_be_boolean():
    hidden, head, targets, weights = inputs(2)
    real = weights > 0
    np.testing.assert_allclose(
        losses.cross_entropy((hidden,), (head,), targets, real, 6),
        plain(hidden, head, targets, real.astype(jnp.float32)),
        rtol=1e-6,
    )


def test_bfloat16_hidden_states():
    hidden, head, targets, weights = inputs(3)
    expected = value_and_gradients(lambda h, w: plain(h, w, targets, weights), hidden, head)
    found = value_and_gradients(
        lambda h, w: losses.cross_entropy((h,), (w,), targets, weights, 4), hidden.astype(jnp.bfloat16), head
    )
    assert [leaf.dtype for leaf in found] == [jnp.float32, jnp.bfloat16, jnp.float32]
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f.astype(np.float32), e, rtol=0.05, atol=0.05)


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Yields the shapes of all values in a program, inside its loops too."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {v.aval.shape for v in equation.outvars}
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            shapes |= shapes_in(inner)
    return shapes


def test_logits_of_all_positions_are_never_in_memory_together():
    hidden, head, targets, weights = inputs()

    def sizes(chunk):
        f = jax.value_and_grad(losses.cross_entropy, argnums=(0, 1))
        closed = jax.make_jaxpr(f, static_argnums=4)((hidden,), (head,), targets, weights, chunk)
        return {math.prod(shape) for shape in shapes_in(closed.jaxpr) if shape and shape[-1] == V}

    assert max(sizes(3)) == B * 3 * V
    assert max(sizes(12)) == B * 12 * V


@pytest.mark.parametrize(
    ("batch", "length", "vocab", "shards", "chunk"),
    [
        (16, 512, 4096, 1, 512),  # 2^25 logits just fit
        (16, 512, 4097, 1, 256),
        (32, 512, 4096, 2, 512),
        (32, 512, 4096, 1, 256),
        (4, 100, 201088, 1, 25),  # 41.7 positions have room
        (4, 101, 201088, 1, 1),  # a prime number
        (4096, 64, 201088, 1, 1),  # not even room for one
    ],
)
def test_chunk_length(batch, length, vocab, shards, chunk):
    assert losses.chunk_length(batch, length, vocab, shards) == chunk


def test_bits_per_byte():
    # Two tokens with probability 1/8 are 6 bits: 1.5 per byte for 4 bytes.
    assert losses.bits_per_byte(2 * math.log(8), 4) == pytest.approx(1.5)


def test_load_balance_loss():
    stats = {
        "load": jnp.array([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]),
        "probability": jnp.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]),
        "z": jnp.array([2.0, 5.0]),
    }
    # Layer 0: 3 * (0.25 + 0.15) = 1.2; layer 1, with even load: 1.
    assert float(losses.load_balance_loss(stats)) == pytest.approx(1.1, rel=1e-6)
    assert float(losses.router_z_loss(stats)) == pytest.approx(3.5)
