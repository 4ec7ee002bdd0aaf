"""The table of checkpoint tensors: names, shapes, and axes both ways."""

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers.checkpoints import SIZES
from helpers.data import shared_data

from gptoss_jax.checkpoints.mappings import HUGGINGFACE, ORIGINAL, axis_sizes, expected_shapes
from gptoss_jax.config import LoraConfig, ModelConfig


@pytest.mark.parametrize(
    ("name", "total", "count"), [("gpt-oss-20b", 13_761_264_768, 459), ("gpt-oss-120b", 65_248_815_744, 687)]
)
def test_expected_tensors_of_the_released_models(name, total, count):
    expected = json.loads(shared_data(f"configs/{name}.tensors.json").read_text())["tensors"]
    published = ModelConfig.from_hf(shared_data(f"configs/{name}.json"))
    config = dataclasses.replace(published, expert_format="mxfp4")
    found = expected_shapes(config, HUGGINGFACE)
    assert {key: list(shape) for key, shape in found.items()} == {
        key: entry["shape"] for key, entry in expected.items()
    }
    packed = {key for key in found if key.endswith(("_blocks", "_scales"))}
    assert packed == {key for key, entry in expected.items() if entry["dtype"] == "U8"}
    assert {entry["dtype"] for entry in expected.values()} == {"U8", "BF16"}
    assert sum(math.prod(shape) * (1 if key in packed else 2) for key, shape in found.items()) == total
    assert len(found) == count


@pytest.mark.parametrize("table", [HUGGINGFACE, ORIGINAL], ids=["huggingface", "original"])
def test_mappings_round_trip(table, hf_folder):
    lora = LoraConfig(rank=5, expert_rank=3)
    config = dataclasses.replace(ModelConfig.from_hf(hf_folder("bfloat16")), lora=lora)
    N, K, H = (SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    starts = {"q": 0, "k": N * H, "v": (N + K) * H}
    for key, mapping in table.items():
        rows, heads = slice(None), key.removeprefix("attention.")[0]
        if table is ORIGINAL and heads in starts:
            rows = slice(starts[heads], starts[heads] + (N if heads == "q" else K) * H)
        shape = mapping.file_shape(config)
        tensor = np.random.default_rng(0).standard_normal(shape)
        ours = mapping.to_model(tensor, config)
        assert np.shares_memory(ours, tensor), key
        np.testing.assert_array_equal(mapping.to_file(ours), tensor[rows], err_msg=key)
        if mapping.keeps_first_axis:
            parts = [mapping.to_file(ours[i : i + 3]) for i in range(0, len(ours), 3)]
            np.testing.assert_array_equal(np.concatenate(parts), tensor[rows], err_msg=key)


def test_mappings_by_hand(hf_folder):
    config = ModelConfig.from_hf(hf_folder("bfloat16"))
    rng = np.random.default_rng(0)
    N, K, H, D, E, F = 6, 2, 16, 160, 7, 64
    assert [axis_sizes(config)[letter] for letter in "NKHDEF"] == [N, K, H, D, E, F]

    q = rng.standard_normal((N * H, D))
    found = HUGGINGFACE["attention.q"].to_model(q, config)
    np.testing.assert_array_equal(found, np.einsum("nhd->dnh", q.reshape(N, H, D)))
    assert found[5, 2, 3] == q[2 * H + 3, 5]
    out = rng.standard_normal((D, N * H))
    for table in (HUGGINGFACE, ORIGINAL):
        found = table["attention.out"].to_model(out, config)
        np.testing.assert_array_equal(found, np.einsum("dnh->nhd", out.reshape(D, N, H)))
    router = rng.standard_normal((E, D))
    for table in (HUGGINGFACE, ORIGINAL):
        np.testing.assert_array_equal(table["moe.router"].to_model(router, config), router.T)
    gate_up = rng.standard_normal((E, D, 2 * F))
    for mapping, tensor in (
        (HUGGINGFACE["moe.gate_up"], gate_up),
        (ORIGINAL["moe.gate_up"], gate_up.swapaxes(1, 2).copy()),
    ):
        found = mapping.to_model(tensor, config)
        np.testing.assert_array_equal(found[:, :, 0], gate_up[..., 0::2])
        np.testing.assert_array_equal(found[:, :, 1], gate_up[..., 1::2])
    blocks = rng.integers(0, 256, (E, 2 * F, D // 32, 16), np.uint8)
    found = HUGGINGFACE["moe.gate_up_blocks"].to_model(blocks, config)
    np.testing.assert_array_equal(found, blocks)
    down = rng.standard_normal((E, D, F))
    found = ORIGINAL["moe.down"].to_model(down, config)
    np.testing.assert_array_equal(found, np.einsum("edf->efd", down))

    qkv, bias = rng.standard_normal(((N + 2 * K) * H, D)), rng.standard_normal((N + 2 * K) * H)
    start = 0
    for part, heads in (("q", N), ("k", K), ("v", K)):
        rows = slice(start, start + heads * H)
        found = ORIGINAL[f"attention.{part}"].to_model(qkv, config)
        np.testing.assert_array_equal(found, np.einsum("nhd->dnh", qkv[rows].reshape(heads, H, D)))
        found = ORIGINAL[f"attention.{part}_bias"].to_model(bias, config)
        np.testing.assert_array_equal(found, bias[rows].reshape(heads, H))
        start = rows.stop
    assert start == len(qkv)
