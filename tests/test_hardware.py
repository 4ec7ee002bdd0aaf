"""Chips, parameter counts against the published ones, and FLOPs counted by hand where all sizes differ."""

import dataclasses

import pytest

from gptoss_jax.config import FULL, SLIDING, LoraConfig, ModelConfig
from gptoss_jax.hardware import (
    CHIPS,
    adapter_weights,
    find_chip,
    flops_per_token,
    mean_visible_keys,
    mfu,
    parameter_counts,
    parse_topology,
    peak_flops,
    resolve_topology,
)  # fmt: skip

# D 10, F 7, N 6, K 2, H 4, E 5, X 3, V 11, W 3; one sliding layer, one full.
TINY = ModelConfig(
    vocab_size=11,
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    num_local_experts=5,
    num_experts_per_tok=3,
    sliding_window=3,
)


def test_released_sizes():
    config = ModelConfig()
    assert parameter_counts(config) == (20_914_757_184, 3_608_307_264)
    config = dataclasses.replace(config, num_hidden_layers=36, num_local_experts=128)
    assert parameter_counts(config) == (116_829_156_672, 5_132_849_472)


def test_parameters_counted_by_hand():
    # q 10*24+24, k and v 10*8+8 each, out 24*10+10, sinks 6: 264 + 176 + 250 + 6 = 696.
    # Router 5*11 = 55, norms 20. An expert: gate and up 10*14+14, down 7*10+10: 234.
    # 2 * (696 + 55 + 20 + 5*234) + last norm 10 + embedding and head 110 each.
    assert parameter_counts(TINY) == (2 * 1941 + 10 + 220, 2 * (771 + 3 * 234) + 10 + 110)


def test_parameters_without_biases_and_tied():
    plain = dataclasses.replace(
        TINY,
        attention_bias=False,
        expert_bias=False,
        router_bias=False,
        learned_sinks=False,
        tie_word_embeddings=True,
    )
    # Attention 240 + 160 + 240, router 50, norms 20, an expert 210.
    assert parameter_counts(plain) == (2 * (710 + 5 * 210) + 10 + 110, 2 * (710 + 3 * 210) + 10 + 110)


@pytest.mark.parametrize(
    ("kind", "seq_len", "sink_tokens", "expected"),
    [
        (FULL, 5, 0, (1 + 2 + 3 + 4 + 5) / 5),
        (SLIDING, 5, 0, (1 + 2 + 3 + 3 + 3) / 5),
        (SLIDING, 7, 2, (1 + 2 + 3 + 4 + 5 + 5 + 5) / 7),
        (SLIDING, 2, 0, (1 + 2) / 2),
    ],
)
def test_mean_visible_keys(kind, seq_len, sink_tokens, expected):
    config = dataclasses.replace(TINY, sink_tokens=sink_tokens)
    assert mean_visible_keys(config, kind, seq_len) == pytest.approx(expected)


def test_flops_counted_by_hand():
    # Multiply-adds of a layer: projections 240 + 160 + 240, router 50, experts 3 * 3*10*7: 1320.
    # Attention over 5 tokens: 2 * 24 * (2.4 sliding + 3.0 full) = 259.2. Head 110.
    forward = 2 * (2 * 1320 + 259.2 + 110)
    assert flops_per_token(TINY, 5, training=False) == pytest.approx(forward)
    assert flops_per_token(TINY, 5) == pytest.approx(3 * forward)
    with pytest.raises(ValueError, match="seq_len is 0"):
        flops_per_token(TINY, 0)


def test_flops_of_adapters():
    config = dataclasses.replace(TINY, lora=LoraConfig(rank=4, expert_rank=2))
    # q and out 4 * (10 + 24), k and v 4 * (10 + 8), three experts 2 * (10 + 14) + 2 * (7 + 10).
    adapters = 2 * (2 * 136 + 2 * 72 + 3 * 82)
    assert adapter_weights(config) == adapters == 1324
    assert adapter_weights(config, ("down", "head")) == 2 * 3 * 34
    assert flops_per_token(config, 5, training=False) == pytest.approx(2 * (2750 + adapters + 259.2))
    # The frozen weights have no gradient.
    assert flops_per_token(config, 5) == pytest.approx(4 * 2750 + 6 * (adapters + 259.2))
    every = dataclasses.replace(config, lora=LoraConfig(rank=4, targets=("router", "head")))
    assert adapter_weights(every) == 2 * 4 * (10 + 5) + 4 * (10 + 11)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
    ],
)
def test_known_peaks(kind, tera):
    assert peak_flops(kind) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "kind",
    ["cpu", "", "NVIDIA A1000", "NVIDIA L40", "NVIDIA A10G", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v9"],
)
def test_unknown_chips_have_no_peak(kind):
    assert peak_flops(kind) is None
    assert mfu(1e12, kind) is None


def test_mfu():
    assert mfu(275e12, "TPU v4", device_count=4) == pytest.approx(0.25)


def test_names_of_chips_and_slices():
    assert all(chip.peak > 1e14 and chip.link > 0 for chip in CHIPS.values())
    assert parse_topology("v5p:4x4x4") == (CHIPS["v5p"], 64)
    assert parse_topology("tpu7x:2x2x2") == (CHIPS["tpu7x"], 16)
    assert parse_topology("v6e:4x8") == (CHIPS["v6e"], 32)
    for bad, words in (
        ("v5q:2x2", "did you mean v5p"),
        ("h200:8", "--chip h200 --devices N"),
        ("v5p:4x4", "v5p has 3 dimensions"),
        ("v5e:4x", "2 dimensions, such as v5e:4x4"),
        ("v5e", "2 dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_topology(bad)
    for name, topology in (
        ("v5p-32", "v5p:2x2x4"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-1", "v5e:1x1"),
        ("V6E-8", "v6e:2x4"),
        ("v5p:2x2x4", "v5p:2x2x4"),
        ("v5p", "v5p"),
    ):
        assert resolve_topology(name) == topology
    for name, words in (("v6e-12", "v6e-8, v6e-16"), ("v4-32", "of v5e, v5p or v6e, such as v5p-32")):
        with pytest.raises(ValueError, match=f"topology is '{name}': .*{words}"):
            resolve_topology(name)
    with pytest.raises(ValueError, match="chip is 'rtx': known chips: v5e, v5p"):
        find_chip("rtx")
    card = find_chip("rtx4090", memory=24e9)
    assert (card.name, card.memory, card.has_times) == ("rtx4090", 24e9, False)
    assert find_chip("H100", memory=94e9).peak == CHIPS["h100"].peak and CHIPS["h100"].memory == 80e9
    with pytest.raises(ValueError, match="memory is 0.0: must be above 0 GB"):
        find_chip("rtx4090", memory=0.0)
