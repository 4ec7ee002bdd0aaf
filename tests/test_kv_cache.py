"""The KV cache: slots of tokens, size, and cached logits against uncached ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels.attention import cached
from gptoss_jax.kernels.attention.cached import LayerCacheView
from gptoss_jax.kernels.attention.reference import AttentionSpec, attention_mask, reference_attention
from gptoss_jax.kernels.layer_view import LayerView
from gptoss_jax.model.kv_cache import grow, init_cache
from gptoss_jax.model.parameters import tree_bytes
from gptoss_jax.model.transformer import bind


@functools.partial(jax.jit, static_argnames="config")
def read(config, params, cache, tokens_BT, segment_ids_BT=None):
    model = bind(config, params)
    hidden_BTD, cache, _ = model.hidden_states(tokens_BT, segment_ids_BT, cache=cache)
    return model.logits(hidden_BTD), cache


@pytest.mark.slow
def test_cached_logits_match_uncached_ones_for_any_chunk_size(
    either_config, random_params, apply_model, cpu_form
):
    # Not seed 0: that model amplifies rounding more than others.
    config, params = either_config, random_params(either_config, 1)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (3, 31))
    expected = apply_model(config, params, tokens_BT)
    assert np.std(expected) > 1, "logits too flat to show a mistake"
    # The window is 4; the ring has 4 slots or, with sink tokens, 6.
    for sizes in ([1] * 31, [5] * 6 + [1], [13, 1, 1, 16]):
        cache, got, start = init_cache(config, 3, 33, jnp.float32), [], 0
        for size in sizes:
            logits, cache = read(config, params, cache, tokens_BT[:, start : start + size])
            got.append(logits)
            start += size
        assert start == 31 and cache.lengths.tolist() == [31, 31, 31]
        # Relative to the largest logit, because all logits are sums with rounding errors of that scale.
        error = np.max(np.abs(np.concatenate(got, axis=1) - expected))
        assert error < 1e-5 * np.max(np.abs(expected))


def test_cached_logits_of_unstacked_layers_match_uncached_ones(tiny_config, random_params, apply_model):
    config = dataclasses.replace(tiny_config, scan_layers=False)
    params = random_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (3, 9))
    expected, got = apply_model(config, params, tokens_BT), []
    cache = init_cache(config, 3, 9, jnp.float32)
    for piece in (tokens_BT[:, :6], *(tokens_BT[:, t : t + 1] for t in (6, 7, 8))):
        logits, cache = read(config, params, cache, piece)
        got.append(logits)
    error = np.max(np.abs(np.concatenate(got, axis=1) - expected))
    assert error < 1e-5 * np.max(np.abs(expected))


def test_ragged_rows_and_a_growing_cache(either_config, random_params, apply_model):
    config, params = either_config, random_params(either_config)
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (3, 20))
    expected = apply_model(config, params, tokens_BT)
    read_B, cache = np.zeros(3, int), init_cache(config, 3, 5, jnp.float32)
    # Each time, every sequence reads another number of tokens, possibly none.
    for room, counts_B in ((5, [1, 3, 0]), (5, [4, 1, 0]), (12, [1, 5, 6]), (20, [6, 0, 1]), (20, [1, 1, 1])):
        cache = grow(config, cache, room) if room > max(cache.layers[1]["keys"].shape[3], 5) else cache
        T = 1 if max(counts_B) == 1 else 6
        rows_BT, segments_BT = np.zeros((3, T), int), np.zeros((3, T), int)
        for b, count in enumerate(counts_B):
            rows_BT[b, :count] = tokens_BT[b, read_B[b] : read_B[b] + count]
            segments_BT[b, :count] = 1
        logits, cache = read(config, params, cache, rows_BT, segments_BT)
        for b, count in enumerate(counts_B):
            wanted = expected[b, read_B[b] : read_B[b] + count]
            np.testing.assert_allclose(logits[b, :count], wanted, atol=1e-5 * np.max(np.abs(expected)))
        read_B += counts_B
        assert cache.lengths.tolist() == read_B.tolist()
    assert read_B.tolist() == [13, 10, 8]


def test_slots_by_hand():
    # Two sink tokens and a ring of four; after nine tokens the ring holds 5, 6, 7 and 8.
    slots = cached.slot_index(jnp.arange(11), 6, 2)
    assert slots.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2]
    held = cached.slot_positions(jnp.array([9, 3, 0, 6]), jnp.arange(6), 6, 2)
    assert held.tolist() == [
        [0, 1, 6, 7, 8, 5],
        [0, 1, 2, -1, -1, -1],
        [-1, -1, -1, -1, -1, -1],
        [0, 1, 2, 3, 4, 5],
    ]


jitted_update = jax.jit(cached.update_cache, static_argnums=3)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 3), st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_a_ring_keeps_the_sink_tokens_and_the_latest_tokens(sink_tokens, window, counts):
    slots, length = sink_tokens + window, 0
    keys = jnp.full((1, 1, 1, slots, 1), -1.0)
    for count in counts:
        layer, new = LayerView(keys, 0), length + jnp.arange(9.0)[None, :, None, None]
        view = LayerCacheView(layer, layer, jnp.array([length]), jnp.array([count]))
        view = jitted_update(view, new, new, AttentionSpec(window, sink_tokens))
        keys, values = view.keys.stack, view.values.stack
        length += count
        np.testing.assert_array_equal(keys, values)
        found = sorted(keys[keys >= 0].tolist())
        assert found == [p for p in range(length) if p < sink_tokens or p >= length - window]
        held = cached.slot_positions(jnp.array([length]), jnp.arange(slots), slots, sink_tokens)
        np.testing.assert_array_equal(held[0], keys[0, 0, 0, :, 0])


@pytest.mark.parametrize(("window", "sink_tokens"), [(None, 0), (7, 0), (7, 3)])
@pytest.mark.parametrize("new", [1, 9])
def test_attention_to_a_cache_matches_the_reference(cpu_form, monkeypatch, window, sink_tokens, new):
    # More slots than a block, and not a multiple of it.
    monkeypatch.setattr(cached, "BLOCK", 4)
    B, N, K, H, L, S = 3, 6, 2, 5, 2, 23
    rng = np.random.default_rng(0)
    lengths_B, total = np.array([14, 0, 5]), 23
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.asarray(2 * rng.standard_normal((B, total, heads, H)), jnp.float32) for heads in (N, K, K)
    )
    sinks_N = jnp.asarray(rng.standard_normal(N), jnp.float32)
    slots = S if window is None else sink_tokens + window
    # The other layer, and slots that were never written, must have no effect.
    stacks = [jnp.full((L, B, K, slots, H), np.nan) for _ in range(2)]
    row_BT = np.broadcast_to(np.arange(total), (B, total))
    spec = AttentionSpec(window, sink_tokens)
    mask_BTS = attention_mask(row_BT * 0, row_BT, spec)
    expected = reference_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS, sinks_N=sinks_N)
    stacks = [stack.at[1].set(0) for stack in stacks]
    empty = LayerCacheView(*(LayerView(stack, 1) for stack in stacks), jnp.zeros(B, int), lengths_B)
    before = jitted_update(empty, k_BTKH, v_BTKH, spec)
    at_BT = lengths_B[:, None] + np.arange(new)
    parts = [jnp.take_along_axis(x, at_BT[:, :, None, None], axis=1) for x in (q_BTNH, k_BTKH, v_BTKH)]
    counts_B = np.array([1, 0, 1]) if new == 1 else np.array([9, 4, 0])
    before = dataclasses.replace(before, lengths_B=lengths_B, counts_B=counts_B)
    after = jitted_update(before, *parts[1:], spec)
    if new == 1:
        # Jitted here, where the block size and the kernels are those of the test.
        y_BTNH = jax.jit(lambda q: cached.decode_attention(q, after, sinks_N=sinks_N))(parts[0])
    else:
        y_BTNH = jax.jit(lambda *qkv: cached.prefill_attention(*qkv, before, spec, sinks_N=sinks_N))(*parts)
    for b, count in enumerate(counts_B):
        wanted = expected[b, lengths_B[b] : lengths_B[b] + count]
        np.testing.assert_allclose(y_BTNH[b, :count], wanted, atol=2e-6)
    if new == 1:
        assert not np.any(y_BTNH[1])


def test_cache_size_of_gpt_oss_20b():
    # 12 full layers of 131,072 slots and 12 rings of 128, 8 heads of 64, keys and values, two bytes each.
    cache = jax.eval_shape(lambda: init_cache(ModelConfig(), 1, 131072, jnp.bfloat16))
    assert tree_bytes(cache.layers) == 12 * (131072 + 128) * 8 * 64 * 2 * 2 == 3224371200
    shapes = [layer["keys"].shape for layer in cache.layers]
    assert shapes == [(12, 1, 8, 128, 64), (12, 1, 8, 131072, 64)]
    # With full-length caches in every layer it would be twice as much.
    assert 24 * 131072 * 8 * 64 * 2 * 2 == 6442450944
    # In a short cache, a ring has no more slots than a full layer.
    assert init_cache(ModelConfig(num_hidden_layers=2), 1, 64, jnp.bfloat16).layers[0]["keys"].shape[3] == 64
