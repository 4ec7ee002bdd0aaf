"""Merging adapters: the arithmetic against formulas, MXFP4 block by block, and the report."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import LORA, deltas_by_hand, random_adapter
from helpers.checkpoints import SIZES
from helpers.weights import BFLOAT16, FORMATS, assert_same_tensors, dequantized, logits, tensors_of

from gptoss_jax.checkpoints import export
from gptoss_jax.checkpoints import merge as merging
from gptoss_jax.checkpoints.adapters import write_adapter
from gptoss_jax.checkpoints.load import from_pretrained
from gptoss_jax.checkpoints.merge import Survival, merge
from gptoss_jax.cli import main
from gptoss_jax.cli.merge import describe
from gptoss_jax.config import LoraConfig, ModelConfig
from gptoss_jax.kernels.mxfp4 import codec

E = SIZES["num_local_experts"]
merge_packed, merge_dense = map(jax.jit, (merging.merge_packed, merging.merge_dense))


@pytest.fixture
def adapter(hf_folder, tmp_path):
    """(lora, spread, edit) -> a folder with a random adapter; `edit` gets the arrays by key and layer."""

    def make(lora=LORA, spread=0.1, edit=lambda arrays: None):
        config = ModelConfig.from_hf(hf_folder("float32"))
        made = random_adapter(config, lora, spread=spread)
        edit({place: tensor.array for place, tensor in made.tensors.items()})
        write_adapter(made, config, tmp_path / "adapter", "some/base")
        return tmp_path / "adapter"

    return make


def plain(tensors):
    """Tensors in float32, with MXFP4 experts dequantized to [E, in, out]."""
    found = {}
    for name, array in tensors.items():
        if name.endswith("_blocks"):
            values = dequantized(array, tensors[name.replace("_blocks", "_scales")])
            found[name.removesuffix("_blocks")] = values.swapaxes(1, 2)
        elif not name.endswith("_scales"):
            found[name] = array.astype(np.float32)
    return found


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("experts", ["float32", "bfloat16"])
def test_merged_weights_are_base_plus_delta(hf_folder, adapter, tmp_path, form, experts):
    folder = adapter()
    merge(hf_folder(form), tmp_path / "merged", folder, experts)
    found, base = tensors_of(tmp_path / "merged"), plain(tensors_of(hf_folder(form)))
    deltas = deltas_by_hand(folder, E)
    # Four projections and three of the experts in each layer, and the head.
    assert len(deltas) == 4 * 7 + 1
    for name, values in base.items():
        wanted = values.astype(np.float64) + deltas.get(name, 0)
        assert found[name].dtype == (np.float32 if experts == "float32" else BFLOAT16)
        if name not in deltas:
            np.testing.assert_array_equal(found[name], wanted.astype(found[name].dtype), err_msg=name)
        tolerance = 2e-7 if experts == "float32" else 2**-8
        atol = tolerance * np.abs(wanted).max()
        np.testing.assert_allclose(found[name].astype(float), wanted, tolerance, atol, err_msg=name)


@pytest.mark.parametrize("form", ["float32", "mxfp4"])
def test_merged_model_equals_the_unmerged_one(hf_folder, adapter, tmp_path, form):
    folder = adapter(spread=0.05)
    unmerged = from_pretrained(hf_folder(form), adapter=folder, dtype="float32")
    merge(hf_folder(form), tmp_path / "merged", folder, "float32")
    expected = logits(unmerged)
    found = logits(from_pretrained(tmp_path / "merged"))
    assert np.abs(expected - logits(from_pretrained(hf_folder(form), dtype="float32"))).max() > 0.1
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


# MXFP4.


def packed_case(rel, seed=0, outputs=64, inputs=96, rank=4):
    """Base blocks and scales on the grid, and factors of a delta with |D| = rel |W|."""
    rng = np.random.default_rng(seed)
    values = (0.02 * rng.standard_normal((outputs, inputs))).astype(np.float32)
    blocks, scales = codec.quantize(values, xp=np)
    base = dequantized(blocks, scales)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((inputs, rank), (rank, outputs)))
    b = b * np.float32(rel * np.linalg.norm(base) / np.linalg.norm(a @ b))
    return base, blocks, scales, a, b


@pytest.mark.parametrize("rel", [0.03, 0.3, 2.0])
def test_each_block_takes_the_best_of_three_scales(rel):
    base, blocks, scales, a, b = packed_case(rel)
    found, powers, sums = merge_packed(blocks, scales, a, b)
    wanted = base + (a.astype(float) @ b).T

    def error(blocks, scales):
        squares = (dequantized(np.asarray(blocks), np.asarray(scales)) - wanted) ** 2
        return squares.reshape(*scales.shape, 32).sum(-1)

    tried = []
    for step in (0, -1, 1):
        powers_tried = (scales.astype(int) + step).astype(np.uint8)
        codes, _ = codec.quantize(wanted.astype(np.float32), xp=np, scales=powers_tried)
        tried.append(error(codes, powers_tried))
    np.testing.assert_allclose(error(found, powers), np.min(tried, axis=0), rtol=1e-5, atol=1e-9)
    step = np.asarray(powers).astype(int) - scales
    assert {*np.unique(step)} <= {-1, 0, 1} and (rel < 0.3 or len(np.unique(step)) == 3)
    # The base's scale stays where no other is better.
    assert (step[tried[0] <= np.min(tried, axis=0) * (1 - 1e-5)] == 0).all()
    effect = dequantized(np.asarray(found), np.asarray(powers)) - base
    delta = wanted - base
    expected = [np.sum(base**2), np.sum(delta**2), np.sum(effect * delta), np.sum((effect - delta) ** 2), 0]
    np.testing.assert_allclose(np.asarray(sums), expected, rtol=1e-4)


def test_blocks_without_a_delta_keep_their_bytes():
    _, blocks, scales, a, b = packed_case(0.5)
    # Bytes that quantization would not give: negative zeros, a scale that is too large, NaN.
    blocks[:, 0, 3], scales[5, 1], scales[9, 2] = 0x88, scales[5, 1] + 2, codec.NAN_SCALE
    a[:32], b[:, 20:] = 0, 0
    found, powers, sums = map(np.asarray, merge_packed(blocks, scales, a, b))
    same = (found == blocks).all(-1) & (powers == scales)
    assert same[:, 0].all() and same[20:].all() and same[9, 2] and same[:20, 1:].mean() < 0.1
    assert np.isfinite(sums).all()


def test_overflow_becomes_nan_and_counts_as_nothing():
    _, blocks, scales, a, b = packed_case(0.5)
    b[:, 7] = np.finfo(np.float32).max
    _, powers, sums = map(np.asarray, merge_packed(blocks, scales, a, b))
    assert (powers[7] == codec.NAN_SCALE).all() and (np.delete(powers, 7, 0) != codec.NAN_SCALE).all()
    assert np.isfinite(sums).all()
    delta = jnp.array([1.0, jnp.nan, jnp.inf])
    assert merging.survival_sums(jnp.ones(3), delta, jnp.array([0.5, 0, 0])) == [1, 1, 0.5, 0.25, 0]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("form", ["float32", "mxfp4"])
def test_adapters_that_are_not_finite_are_refused(hf_folder, adapter, tmp_path, form, value):
    def edit(arrays):
        arrays["moe.gate_up_lora_b", 2][3, 1, 0, 5] = arrays["head.lora_a", -1][0] = value

    message = r"adapter: not merged: NaN or infinite values in .*lm_head.lora_A.weight"
    with pytest.raises(ValueError, match=message) as caught:
        merge(hf_folder(form), tmp_path / "merged", adapter(edit=edit))
    assert "model.layers.2.mlp.experts.base_layer.lora_B.weight" in str(caught.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("rel", "kept", "rounded", "bfloat16"),
    [
        (0.003, (0.00, 0.003), (3.17, 0.049), (0.93, 0.001)),
        (0.01, (0.00, 0.010), (0.95, 0.049), (1.00, 0.002)),
        (0.03, (0.05, 0.030), (0.34, 0.053), (1.00, 0.002)),
        (0.1, (0.69, 0.076), (0.65, 0.087), (1.00, 0.002)),
        (0.3, (0.97, 0.112), (0.97, 0.121), (1.00, 0.002)),
    ],
)
def test_survival_of_a_small_delta(rel, kept, rounded, bfloat16):
    """The table in docs/weights.md: Gaussian weights on the grid, a delta of rank 8."""
    _, blocks, scales, a, b = packed_case(rel, outputs=512, inputs=2880, rank=8)
    base = codec.dequantize(blocks, scales, jnp.float32)
    for expected, sums in (
        (kept, merge_packed(blocks, scales, a, b)[2]),
        (rounded, merge_dense(base, a, b)[2]),
        (bfloat16, merging.merge_plain(base, a, b, "ir,ro->oi", "bfloat16")[1]),
    ):
        found = Survival() + sums
        assert found.size == pytest.approx(rel, rel=1e-3)
        assert found.share == pytest.approx(expected[0], abs=0.006)
        assert found.noise == pytest.approx(expected[1], abs=0.0006)


def test_packed_base_stays_packed(hf_folder, adapter, tmp_path):
    def edit(arrays):
        arrays["moe.gate_up_lora_b", 1][...] = 0
        arrays["moe.down_lora_a", 2][[0, 3]] = 0

    folder = adapter(spread=0.05, edit=edit)
    survival = merge(hf_folder("mxfp4"), tmp_path / "merged", folder)
    found, base = tensors_of(tmp_path / "merged"), tensors_of(hf_folder("mxfp4"))
    assert found.keys() == base.keys()
    deltas = deltas_by_hand(folder, E)
    for name, array in base.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        if not name.endswith(("_blocks", "_scales")):
            continue
        delta = deltas[name.rpartition("_")[0]].swapaxes(1, 2)
        changed = (found[name] != array).reshape(*array.shape[:3], -1).any(-1)
        has_delta = (delta != 0).reshape(*changed.shape, 32).any(-1)
        assert not (changed & ~has_delta).any(), name
        if name.endswith("_blocks"):
            assert changed.any() == has_delta.any(), name
        if "layers.1.mlp.experts.gate_up" in name:
            assert not changed.any()
        if "layers.2.mlp.experts.down" in name:
            assert not changed[[0, 3]].any() and (name.endswith("_scales") or changed[1].any())
    # The bytes are those of one matrix at a time, gate and up alternating.
    name = "model.layers.3.mlp.experts.gate_up_proj"
    merged = plain(found)[name][4] - plain(base)[name][4] - deltas[name][4]
    assert np.linalg.norm(merged) < 0.2 * np.linalg.norm(plain(base)[name][4])
    assert survival.keys() == {"q", "k", "v", "out", "gate_up", "down", "router", "head"}
    down = {name: delta for name, delta in deltas.items() if "down" in name}
    effect = sum((delta * (plain(found)[name] - plain(base)[name])).sum() for name, delta in down.items())
    square = sum((delta**2).sum() for delta in down.values())
    assert survival["down"].share == pytest.approx(effect / square, rel=1e-4)


def test_merging_with_a_shard_between_blocks_and_scales(hf_folder, adapter, tmp_path, monkeypatch):
    folder = adapter(spread=0.05)
    merge(hf_folder("mxfp4"), tmp_path / "one", folder)
    whole = export.write_folder

    def in_shards(*arguments, **named):
        return whole(*arguments, **named, shard_bytes=60_000)

    monkeypatch.setattr(export, "write_folder", in_shards)
    merge(hf_folder("mxfp4"), tmp_path / "many", folder)
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 10
    assert_same_tensors(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))


def test_plain_base_is_quantized_as_a_merged_one(hf_folder, adapter, tmp_path):
    folder = adapter(spread=0.05)
    survival = merge(hf_folder("float32"), tmp_path / "packed", folder, "mxfp4")
    merge(hf_folder("float32"), tmp_path / "plain", folder, "float32")
    export.convert(tmp_path / "plain", tmp_path / "converted", "mxfp4")
    assert_same_tensors(tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "converted"))
    assert 0.9 < survival["gate_up"].share < 1.1
    assert [*survival] == ["q", "k", "v", "out", "router", "gate_up", "down", "head"]
    # The base's own rounding is reported separately, as large as without an adapter.
    assert survival["q"].base_noise == 0 and survival["down"].base_noise == pytest.approx(0.115, abs=0.01)


def test_negative_zeros_of_the_base_stay(edited_folder, adapter, tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    folder = edited_folder("bfloat16", lambda tensors: tensors[name].__setitem__((2, 5), -0.0))
    merge(folder, tmp_path / "merged", adapter(LoraConfig(targets=("q",))))
    np.testing.assert_array_equal(np.signbit(tensors_of(tmp_path / "merged")[name][2, 5].astype(float)), True)


def test_command_and_report(hf_folder, adapter, tmp_path, capsys):
    folder = adapter(LoraConfig(rank=2, expert_rank=2, alpha=2.0, targets=("q", "gate_up", "down")), 0.02)
    arguments = ["merge", str(hf_folder("mxfp4")), str(tmp_path / "out"), "--adapter", str(folder)]
    assert main.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"{tmp_path / 'out'}: [\d.]+ kB written in", lines[0])
    assert [line.split()[0] for line in lines[2:5]] == ["q", "gate_up", "down"]
    advice = "merge with --experts bfloat16, or serve the base model with the adapter (gptoss export-adapter)"
    lost = "Most of the adapter's change in gate_up, down was lost to rounding to mxfp4"
    assert lines[5:] == [f"{lost}; {advice}"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert main.main([*arguments[:2], str(tmp_path / "bf16"), *arguments[3:], "--experts", "bfloat16"]) == 0
    assert "rounding" not in capsys.readouterr().out
    assert main.main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


def test_report_of_what_survived():
    lost = {"q": Survival(100, 1, 0.98, 0.01), "down": Survival(100, 4, 0.4, 4)}
    lines = describe(lost, "bfloat16")
    assert lines[1].split() == ["q", "10.000%", "98.0%", "1.000%"]
    assert lines[2].split() == ["down", "20.000%", "10.0%", "20.000%"]
    assert lines[3].startswith("Most of the adapter's change in down was lost to rounding to bfloat16; merge")
    assert "--experts float32, or serve" in lines[3] and "--experts" not in describe(lost, "float32")[3]
    assert len(describe({"q": Survival(100, 1, 0.98, 0.01)}, "mxfp4")) == 2
    # A change of 0.5% of a dense base, whose own rounding is 12% of it.
    lines = describe({"down": Survival(100, 0.0025, 0.0025, 0.01, 1.44)}, "mxfp4")
    assert lines[1].split() == ["down", "0.500%", "100.0%", "1.000%"]
    assert lines[2].endswith("not in MXFP4. Its own rounding is not part of the noise: 12.000% in down")
    changed = "Quantizing the base changed its weights more than the adapter: 12.000% against 0.500% in down"
    assert lines[3].startswith(f"{changed}; merge with --experts bfloat16, or serve") and len(lines) == 4
    assert len(describe({"down": Survival(100, 4, 4, 1, 1.44)}, "mxfp4")) == 3
    # Nothing is lost if the adapter was trained with the rounded weights.
    trained = describe({"down": Survival(100, 0.0025, 0.0025, 0.01, 1.44)}, "mxfp4", is_trained=True)
    assert trained[:-1] == lines[:-1] and trained[-1].startswith("The run computed with the weights as they")
