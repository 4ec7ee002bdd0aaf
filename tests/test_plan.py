"""`gptoss plan`: bytes against a real sharded state, collectives read from HLO, ranking, the command line,
and a small step compiled for TPUs."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess

import jax
import pytest
from helpers.tpu_compiler import needs_libtpu
from rich.console import Console

from gptoss_jax.cli import main
from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from gptoss_jax.config.preset import read_preset
from gptoss_jax.hardware import CHIPS, GIB, flops_per_token, parameter_counts
from gptoss_jax.parallel.mesh import AXES, make_mesh
from gptoss_jax.planning.compile_tpu import CompiledStep, compile_step, read_refusal
from gptoss_jax.planning.estimate import (
    PROCESS_BYTES,
    TPU_MARGIN,
    block_temporaries,
    estimate,
    loss_temporaries,
)
from gptoss_jax.planning.hlo import collectives, mesh_axes, parse_groups, shape_bytes
from gptoss_jax.planning.plan import MAX_COMPILED, all_meshes, make_plan, mesh_name, parse_mesh, rank
from gptoss_jax.planning.report import show
from gptoss_jax.planning.shards import step_on
from gptoss_jax.planning.traffic import transfer_seconds
from gptoss_jax.training.state import create_state

# Sizes that all differ, and are divisible by 2 and 4 where a mesh axis splits them.
SMALL = TrainConfig(
    model=ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=12,
        num_experts_per_tok=3,
        sliding_window=8,
        router_aux_loss_coef=0.01,
        remat="block",
    ),
    data=DataConfig(seq_len=128, batch_size=16),
)


def mesh_of(*sizes: int) -> dict[str, int]:
    return dict.fromkeys(AXES, 1) | dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))


def with_model(**changes) -> TrainConfig:
    return dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, **changes))


@pytest.mark.parametrize(
    ("sizes", "optimizer"), [((1, 2, 2, 2), "adamw"), ((2, 4, 1, 1), "muon"), ((8, 1, 1, 1), "adamw")]
)
def test_state_bytes_match_a_real_state(sizes, optimizer):
    config = dataclasses.replace(SMALL, optim=OptimConfig(name=optimizer))
    state = create_state(config, make_mesh(MeshConfig(**mesh_of(*sizes))))

    def on_one_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    memory = estimate(config, CHIPS["v5e"], mesh_of(*sizes)).memory
    assert memory.parameters == memory.gradients == on_one_device(state.params)
    assert memory.parameters + memory.optimizer == on_one_device(state)


def test_flops_and_time_of_compute():
    chip = CHIPS["v5p"]
    tokens = 16 * 128
    plain = estimate(with_model(remat="none"), chip, mesh_of(1, 2, 2, 2))
    assert plain.useful_flops == pytest.approx(flops_per_token(SMALL.model, 128) * tokens / 8)
    assert plain.flops == plain.useful_flops
    assert plain.compute_seconds == pytest.approx(plain.flops / 459e12)
    # One more forward pass of the blocks: a third of all but the head.
    head = 6 * 64 * 96 * tokens / 8
    block = estimate(SMALL, chip, mesh_of(1, 2, 2, 2))
    assert block.flops - block.useful_flops == pytest.approx((plain.flops - head) / 3)
    dots = estimate(with_model(remat="dots"), chip, mesh_of(1, 2, 2, 2))
    assert plain.flops < dots.flops < block.flops


def test_activations_follow_remat():
    kept = {
        remat: estimate(with_model(remat=remat), CHIPS["v5p"], mesh_of(2, 1, 1, 1)).memory.activations
        for remat in ("none", "dots", "block")
    }
    tokens = 8 * 128
    assert kept["block"] == 2 * tokens * 64 * 2
    # Also the attention output, q, k and v in bfloat16, and the router's logits in float32.
    assert kept["dots"] == kept["block"] + 2 * tokens * ((64 + 16 * 16) * 2 + 12 * 4)
    assert kept["none"] > kept["dots"]


def test_collectives_counted_by_hand():
    one = estimate(SMALL, CHIPS["v5p"], mesh_of(1, 1, 4, 1))
    sent = {(t.purpose, t.axes): t.sent for t in one.collectives}
    # A device's 512 tokens to 3 experts each, in both directions, in three passes of 2 layers; 3 of 4 rows
    # leave.
    rows = 512 * 3 * 64 * 2 * 2 * 3 * 2 * 3 / 4
    assert sent["dispatch and combine", ("expert",)] == rows
    assert {axes for _, axes in sent} == {("expert",)}
    # v5e sends buffers with room for half as many rows again.
    (padded,) = (
        cost
        for cost in estimate(SMALL, CHIPS["v5e"], mesh_of(1, 1, 4, 1)).collectives
        if cost.sent == 1.5 * rows
    )
    assert padded.purpose == "dispatch and combine" and padded.kind == "all-to-all"
    one = estimate(SMALL, CHIPS["v5e"], mesh_of(1, 2, 1, 1))
    sent = {t.purpose: t.sent for t in one.collectives}
    D, F, E, H = 64, 40, 12, 16
    # Only matrices are split over FSDP.
    block = D * 8 * H + 2 * D * 4 * H + 8 * H * D + D * E + E * 3 * D * F
    vocabulary = 2 * 96 * D
    # The embedding is sent in float32, all else in bfloat16.
    assert sent["gather parameters"] == (2 * 2 * 2 * block + 4 * 96 * D + 2 * 96 * D) / 2
    assert sent["scatter gradients"] == (2 * 2 * block + 4 * vocabulary) / 2
    alone = estimate(SMALL, CHIPS["v5e"], mesh_of(1, 1, 1, 1))
    assert alone.collectives == () and alone.communication_seconds == 0
    assert alone.overlapped_seconds == alone.serial_seconds == alone.compute_seconds


def test_context_axis():
    mesh = mesh_of(1, 1, 1, 1) | {"context": 4}
    one, fsdp = estimate(SMALL, CHIPS["v5p"], mesh), estimate(SMALL, CHIPS["v5p"], mesh_of(1, 4, 1, 1))
    sent = {(t.purpose, t.kind, t.axes): t.sent for t in one.collectives}
    # Two bytes for each of 16 values of 4 keys and 4 values, for all tokens of 16 sequences; one full layer,
    # in two passes, and their gradients.
    whole = 2 * 16 * (4 + 4) * 16 * 128
    assert sent["gather keys and values", "all-gather", ("context",)] == 2 * whole * 3 / 4
    assert sent["scatter their gradients", "reduce-scatter", ("context",)] == whole * 3 / 4
    # Seven keys and values of two chunks of each sequence; one sliding layer, three times.
    assert sent["exchange halos", "collective-permute", ("context",)] == 3 * 2 * 7 * whole / 128
    # Otherwise as FSDP, except for the arrays of whole sequences.
    others = {t.purpose: t.sent for t in fsdp.collectives}
    assert {purpose: size for (purpose, *_), size in sent.items() if purpose in others} == others
    assert one.memory.temporaries == fsdp.memory.temporaries + 2 * whole
    assert dataclasses.replace(one.memory, temporaries=0) == dataclasses.replace(fsdp.memory, temporaries=0)
    without = estimate(with_model(remat="none"), CHIPS["v5p"], mesh)
    assert {t.purpose: t.sent for t in without.collectives}["exchange halos"] == 2 * 2 * 7 * whole / 128
    with pytest.raises(ValueError, match="data.seq_len is 128: must be a multiple of 96, twice mesh.context"):
        estimate(SMALL, CHIPS["v5p"], mesh | {"context": 48})
    # Proposed if there are fewer sequences than devices.
    few = dataclasses.replace(SMALL, data=DataConfig(seq_len=128, batch_size=4))
    for config, sizes in ((SMALL, {1}), (few, {1, 2, 4, 8})):
        found = make_plan(config, chip="v5e", devices=8, has_suggestion=False).estimates
        assert {one.mesh["context"] for one in found} == sizes


def test_transfer_time():
    chip = CHIPS["h200"]
    inside = mesh_of(1, 1, 8, 1)
    assert transfer_seconds(chip, inside, "all-gather", ("expert",), 450e9) == pytest.approx(1)
    # Two nodes: eight devices share the network for the rings.
    across = mesh_of(1, 16, 1, 1)
    assert transfer_seconds(chip, across, "all-gather", ("fsdp",), 450e9) == pytest.approx(450 / 8 / 50)
    # Of an all-to-all, the share for the other node: 8 of 15 peers.
    across = mesh_of(1, 1, 16, 1)
    exchange = transfer_seconds(chip, across, "ragged-all-to-all", ("expert",), 450e9)
    assert exchange == pytest.approx(450 * 8 / 15 / 50)
    # The same axis within nodes, and an axis with one device per node.
    both = mesh_of(4, 1, 8, 1)
    assert transfer_seconds(chip, both, "all-to-all", ("expert",), 450e9) == pytest.approx(1)
    assert transfer_seconds(chip, both, "all-reduce", ("data",), 450e9) == pytest.approx(9)


def test_meshes():
    assert parse_mesh("fsdp=4,expert=2", 8) == mesh_of(1, 4, 2, 1)
    assert parse_mesh("expert=2, fsdp=-1", 8) == mesh_of(1, 4, 2, 1)
    meshes = list(all_meshes(8))
    # Ways to distribute three factors of two over four axes.
    assert len(meshes) == len({tuple(mesh.values()) for mesh in meshes}) == math.comb(6, 3)
    assert {math.prod(mesh.values()) for mesh in meshes} == {8}
    assert {mesh["context"] for mesh in meshes} == {1}
    meshes = list(all_meshes(8, context=(1, 2, 4, 8)))
    assert len({tuple(mesh.values()) for mesh in meshes}) == math.comb(7, 3)
    for text, words in (
        ("fdsp=8", "did you mean fsdp"),
        ("fsdp", "axis=number"),
        ("fsdp=0", "mesh.fsdp is 0"),
        ("fsdp=3", "multiply to 8, the number of devices"),
        ("fsdp=3,data=-1", "multiply to 8, the number of devices"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_mesh(text, 8)


def test_ranking(monkeypatch):
    found = make_plan(SMALL, chip="v5e", devices=8).estimates
    assert found == rank(found[::-1])
    seconds = [one.serial_seconds for one in found]
    assert seconds == sorted(seconds) and all(one.fits for one in found)
    # 8 divides neither the key/value heads nor the experts.
    assert all(one.mesh["tensor"] <= 4 and one.mesh["expert"] <= 4 for one in found)
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=5e6))
    tight = make_plan(SMALL, chip="v5e", devices=8).estimates
    fits = [one.fits for one in tight]
    assert fits == sorted(fits, reverse=True) and set(fits) == {True, False}
    assert all(one.memory.total <= 0.9 * 5e6 for one in tight if one.fits)
    with pytest.raises(ValueError, match=r"no mesh of 7 devices can split .*must be a multiple of the 7"):
        make_plan(SMALL, chip="v5e", devices=7)
    with pytest.raises(ValueError, match="mesh.tensor is 8: must divide 4"):
        make_plan(SMALL, chip="v5e", devices=8, meshes=["tensor=8"])


@pytest.mark.parametrize(
    ("sizes", "vocabulary", "shards"),
    [
        # Many rows of a table, few tokens: devices exchange hidden states.
        ((1, 4, 2, 1), 96_000, 8),
        ((1, 1, 2, 4), 96_000, 8),
        # Few rows: the table is gathered.
        ((1, 4, 2, 1), 96, 1),
        ((2, 1, 1, 4), 96, 4),
        ((1, 1, 1, 1), 9_600, 1),
    ],
)
def test_the_loss_holds_a_shard_of_the_head(sizes, vocabulary, shards):
    config = with_model(vocab_size=vocabulary, compute_dtype="bfloat16")
    step = step_on(config, mesh_of(*sizes))
    data, rows = config.data, config.data.batch_size // math.prod(sizes[:3])
    head = vocabulary * config.model.hidden_size // shards
    # Logits of all positions fit in one chunk: float32, their exponentials, and their gradient in bfloat16.
    logits = rows * data.seq_len * vocabulary // sizes[3] * (4 + 4 + 2)
    assert loss_temporaries(step) == head * (2 + 4) + logits


def test_only_the_largest_gradient_of_a_block_counts():
    """The gradient of keys and values is smaller than that of the experts."""

    def temporaries(heads):
        model = {"compute_dtype": "bfloat16", "remat": "none", "num_key_value_heads": heads}
        return block_temporaries(step_on(with_model(**model), mesh_of(1, 1, 1, 1)))

    keys_and_values = 2 * (64 + 1) * 16  # weights and biases of a head
    assert temporaries(8) - temporaries(4) == 4 * keys_and_values * 2


def test_compiled_steps_take_at_most_their_margin():
    path = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "scaling.json"
    rows = [row for row in json.loads(path.read_text()) if row["compiled"]]
    factors = []
    for row in rows:
        memory, step = row["estimate"]["memory"], row["compiled"]
        more = (step["peak"] if step["fits"] else step["needed"]) - memory["total"]
        factors.append(more / (memory["activations"] + memory["temporaries"]))
    assert len(rows) > 10 and min(factors) > 0 and 0.9 * TPU_MARGIN < max(factors) <= TPU_MARGIN


def test_verdicts():
    one = estimate(SMALL, CHIPS["v5p"], mesh_of(1, 2, 2, 2))
    memory = one.memory
    assert one.margin == TPU_MARGIN * (memory.activations + memory.temporaries)
    for capacity, verdict in (
        (memory.total + one.margin, "fits"),
        (memory.total + one.margin - 1, "close"),
        (memory.total / 0.9 + 1, "close"),
        (memory.total, "no"),
    ):
        other = dataclasses.replace(one, capacity=capacity)
        assert other.verdict == verdict and other.fits == (verdict == "fits")
    # Without compiled steps there is no margin.
    assert estimate(SMALL, CHIPS["h200"], mesh_of(1, 2, 2, 2)).margin == 0


def test_meshes_are_compiled_until_one_fits(monkeypatch, capsys, preset):
    tried, fitting = [], 2

    def compile_step(config, topology, mesh):
        tried.append((topology, mesh))
        fits = len(tried) > fitting
        return CompiledStep(mesh, fits, 1.0, needed=None if fits else 2e12, peak=int(fits) * 10**9)

    monkeypatch.setattr("gptoss_jax.planning.plan.compile_step", compile_step)
    assert main.main(["plan", preset, "--topology", "v5litepod-8"]) == 0
    estimates = make_plan(SMALL, chip="v5e", devices=8).estimates
    assert tried == [("v5e:2x4", one.mesh) for one in estimates[:3]]
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 of v5e:2x4 (v5litepod-8, 8 chips)" in shown
    assert f"does not fit, 2,000 GB of 16.9. Best compiled: {mesh_name(estimates[2].mesh)}, 1.00 GB" in shown
    # All given meshes are compiled, and only they count.
    tried.clear()
    fitting = 10
    plan = make_plan(SMALL, topology="v5e:2x4", meshes=["fsdp=8", "data=8"])
    assert len(tried) == 2 and plan.best is None and not plan.fits
    tried.clear()
    assert not make_plan(SMALL, topology="v5e:2x4").fits and len(tried) == MAX_COMPILED


def test_suggestions(capsys, monkeypatch, preset):
    args = ["plan", preset, "--chip", "h200", "--devices", "4", "--mesh", "data=4"]

    def total(**batch):
        return estimate(changed(**batch), CHIPS["h200"], mesh_of(4, 1, 1, 1)).memory.total

    def changed(batch_size=16, grad_accum_steps=1):
        data, optim = (
            DataConfig(seq_len=128, batch_size=batch_size),
            OptimConfig(grad_accum_steps=grad_accum_steps),
        )
        return dataclasses.replace(SMALL, data=data, optim=optim)

    # Two rows on a device fit, by microbatches or a smaller batch: a second copy of the gradients counts.
    for size, flag in (
        (total(grad_accum_steps=2), "With --optim.grad-accum-steps 2, the estimate fits: data=4, "),
        (total(batch_size=4), "With --data.batch-size 4, the estimate fits: data=4, "),
        (total(batch_size=4) - 1000, "More devices need less memory each."),
    ):
        monkeypatch.setitem(CHIPS, "h200", dataclasses.replace(CHIPS["h200"], memory=(size + 1) / 0.9))
        with pytest.raises(SystemExit):
            main.main(args)
        assert flag in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    assert main.main([*args[:-2], "--optim.grad-accum-steps", "16"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A microbatch of 1 row cannot be split over 4 devices. With --optim.grad-accum-steps 1: " in shown


def test_a_chip_of_which_only_the_memory_is_known(capsys, tmp_path, preset):
    file = tmp_path / "plan.json"
    args = ["plan", preset, "--chip", "rtx4090", "--memory", "24"]
    assert main.main([*args, "--devices", "2", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "2 of rtx4090, each 24.0 GB\n" in shown and "GB of 24.0." in shown and "No times" in shown
    assert "compute" not in shown and "tokens/s" not in shown and "gptoss train" in shown
    plan = json.loads(file.read_text())
    assert plan["chip"]["peak"] is None and plan["estimates"][0]["compute_seconds"] is None
    assert main.main([*args, "--inference", "--experts", "bfloat16"]) == 0
    assert "1 of rtx4090, each 24.0 GB" in capsys.readouterr().out
    assert main.main(["plan", preset, "--topology", "v5e:2x2", "--memory", "24"]) == 2
    assert "already gives chip, devices and memory" in capsys.readouterr().err


def test_a_cpu_is_this_machine_with_what_a_process_takes(capsys, tmp_path, preset):
    file = tmp_path / "plan.json"
    assert main.main(["plan", preset, "--chip", "cpu", "--json", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Devices 1 of cpu, each" in shown and "temp process total" in shown and "No times" in shown
    (found,) = json.loads(file.read_text())["estimates"]
    names = ("parameters", "gradients", "activations", "temporaries")
    of_step = sum(found["memory"][name] for name in names)
    assert found["memory"]["process"] == PROCESS_BYTES + 2 * of_step
    assert found["memory"]["total"] > found["memory"]["process"]
    assert found["capacity"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with pytest.raises(SystemExit, match="1"):
        main.main(["plan", preset, "--chip", "CPU", "--memory", "0.5"])
    shown = capsys.readouterr().out
    assert "No mesh fits" in shown and "More devices" not in shown
    assert main.main(["plan", preset, "--chip", "cpu", "--devices", "2"]) == 2
    assert "devices is 2: must be 1 with --chip cpu" in capsys.readouterr().err
    assert main.main(["plan", preset, "--chip", "h100", "--devices", "1", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["estimates"][0]["memory"]["process"] == 0
    assert "process" not in capsys.readouterr().out


def test_one_device_sends_nothing(capsys, preset):
    assert main.main(["plan", preset, "--chip", "h100", "--devices", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Sent by" not in shown and "overlap" not in shown


HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%part.1 (p: bf16[4,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
}

%part.2 (p: bf16[4,8],
    q: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter (input: f32[16,4]) -> f32[8,4] {
  %input = f32[16,4]{1,0} parameter(0)
  %all-reduce.9 = f32[16,4]{1,0} all-reduce(%input), channel_id=8, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %slice = f32[8,4]{1,0} slice(%all-reduce.9), slice={[0:8], [0:4]}
}

%body (carry: (s32[], f32[6])) -> (s32[], f32[6]) {
  %carry = (s32[], f32[6]{0}) parameter(0)
  %x = f32[6]{0} get-tuple-element(%carry), index=1
  %fused = bf16[8,8]{1,0} fusion(%x), kind=kLoop, calls=%part.1
  %fused.2 = bf16[8,8]{1,0} fusion(%x), kind=kLoop, calls=%part.2
  %all-reduce.2 = (f32[6]{0:T(128)}, f32[]{:T(128)}) all-reduce(%x, %x), channel_id=1, replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, to_apply=%add
  %rows = bf16[10,4]{1,0} custom-call(%x), custom_call_target="rows"
  %exchange = bf16[32,4]{1,0} ragged-all-to-all(%rows, %rows), channel_id=2, replica_groups={{0,2},{1,3},{4,6},{5,7}}
  ROOT %next = (s32[], f32[6]{0}) tuple(%x, %x)
}

%condition (carry: (s32[], f32[6])) -> pred[] {
  %carry = (s32[], f32[6]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%wrapped (w: f32[8,2]) -> f32[4,2] {
  %w = f32[8,2]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4,2]{1,0} reduce-scatter(%w), channel_id=11, replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={0}, to_apply=%add
}

%never (n: f32[3]) -> f32[3] {
  %n = f32[3]{0} parameter(0)
  ROOT %all-reduce.3 = f32[3]{0} all-reduce(%n), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (x: f32[6], y: f32[8,2]) -> f32[6] {
  %x = f32[6]{0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %loop = (s32[], f32[6]{0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %start = ((f32[8,2]{1,0}), f32[4,2]{1,0}) async-start(%y), calls=%wrapped
  %done = f32[4,2]{1,0} async-done(%start), calls=%wrapped
  %gather-start = (f32[6]{0}, f32[48]{0}) all-gather-start(%x), channel_id=12, replica_groups={}, dimensions={0}
  %gather-done = f32[48]{0} all-gather-done(%gather-start)
  %permute-start = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=13, source_target_pairs={{0,0},{1,3},{3,1}}
  %permute-done = f32[6]{0} collective-permute-done(%permute-start)
  %rows = bf16[768,2,128]{2,1,0:T(2,128)(2,1)S(1)} bitcast(%x)
  %ragged-start = ((bf16[768,2,128]{2,1,0:T(2,128)(2,1)S(1)}, bf16[960,2,128]{2,1,0:T(2,128)(2,1)}, s32[12]{0:T(128)S(1)}, s32[12]{0:T(128)S(1)}, s32[12]{0:T(128)S(1)}, /*index=5*/s32[12]{0:T(128)}), bf16[960,2,128]{2,1,0:T(2,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) ragged-all-to-all-start(%rows, %x, %x, %x, %x, /*index=5*/%x), channel_id=14, replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %ragged-done = bf16[960,2,128]{2,1,0:T(2,128)(2,1)} ragged-all-to-all-done(%ragged-start)
  ROOT %fused.3 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_collectives_of_a_program():
    mesh = {"x": 2, "y": 2, "z": 2}
    found = {one.name: one for one in collectives(HLO)}
    assert {name: (one.kind, one.bytes, one.times, one.axes(mesh)) for name, one in found.items()} == {
        # Twice in the text, but once in the program.
        "all-gather.1": ("all-gather", 128, 12, ("z",)),
        "all-reduce.2": ("all-reduce", 28, 12, ("y",)),
        # The bytes sent, not the size of the receive buffer.
        "exchange": ("ragged-all-to-all", 80, 12, ("y",)),
        "reduce-scatter.1": ("reduce-scatter", 64, 1, ("x",)),
        "gather-start": ("all-gather", 192, 1, ("x", "y", "z")),
        "permute-start": ("collective-permute", 24, 1, ("y",)),
        "ragged-start": ("ragged-all-to-all", 768 * 2 * 128 * 2, 1, ("z",)),
        "all-reduce.9": ("reduce-scatter", 256, 1, ("x",)),
    }
    assert all(one.trips_known for one in found.values())
    assert found["all-reduce.2"].shapes == ("f32[6]", "f32[]")
    assert found["all-gather.1"].sent == 64 and found["all-reduce.2"].sent == 28
    assert found["permute-start"].sent == 24
    bare = HLO.replace('backend_config={"known_trip_count":{"n":"12"}}', "metadata={}")
    in_loop = {"all-gather.1", "all-reduce.2", "exchange"}
    assert {one.name: one.times for one in collectives(bare) if not one.trips_known} == dict.fromkeys(
        in_loop, 1
    )
    counted = bare.replace(
        "ROOT %less = pred[] constant(true)",
        "%i = s32[] get-tuple-element(%carry), index=0\n  %n = s32[]{:T(128)} constant(5)\n"
        "  ROOT %less = pred[] compare(%i, %n), direction=LT",
    )
    repeated = {one.name: one.times for one in collectives(counted) if one.times > 1}
    assert repeated == dict.fromkeys(in_loop, 5)
    assert all(one.trips_known for one in collectives(counted))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x={}", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8], x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0), x", ((0, 4), (2, 6), (1, 5), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            ((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
        ("replica_groups={}, x", ()),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
    ],
)
def test_replica_groups(text, groups):
    assert parse_groups(text) == groups


def test_axes_of_replica_groups():
    mesh = {"x": 2, "y": 1, "z": 3}
    assert mesh_axes(((0, 1, 2), (3, 4, 5)), mesh) == ("z",)
    assert mesh_axes(((0, 3), (1, 4), (2, 5)), mesh) == ("x",)
    assert mesh_axes(((5, 4, 3, 2, 1, 0),), mesh) == ("x", "z")
    assert mesh_axes(((0, 1), (2, 3), (4, 5)), mesh) == ("?",)
    assert mesh_axes(((0, 1), (1, 2), (2, 0)), mesh, pairs=True) == ("z",)


@pytest.mark.parametrize(
    ("shape", "size"), [("bf16[2,3]", 12), ("f32[]", 4), ("pred[5]", 5), ("f8e4m3fn[4]", 4), ("s4[6]", 3)]
)
def test_shape_bytes(shape, size):
    assert shape_bytes(shape) == size


def test_out_of_memory_errors_are_parsed():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(16.13G) exceeds available HBM (15.75G).\nmore"
    )
    values = read_refusal(message)
    assert values["refusal"].startswith("Ran out of memory on HBM") and "\n" not in values["refusal"]
    assert (values["needed"], values["available"]) == (16.13 * GIB, 15.75 * GIB)
    values = read_refusal("RESOURCE_EXHAUSTED: too much")
    assert values == {"fits": False, "refusal": "too much", "needed": None, "available": None}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        f"from gptoss_jax.config import TrainConfig\nconfig = TrainConfig.from_dict({SMALL.to_dict()})"
    )
    return str(path)


def test_command(capsys, tmp_path, preset):
    file = tmp_path / "plan.json"
    args = ["plan", preset, "--chip", "h200", "--devices", "16", "--json", str(file)]
    assert (
        main.main([*args, "--model.remat", "none", "--data.seq-len=64", "--optim.grad_accum_steps", "2"]) == 0
    )
    captured = capsys.readouterr()
    # At most 80 columns, except for the command, and nothing is truncated.
    *lines, command = captured.out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in captured.out
    words = command.split()
    assert words[:3] == ["gptoss", "train", preset] and words[-6:-4] == ["--model.remat", "none"]
    assert "not a measurement" in captured.out and "tokens/s" in captured.out
    plan = json.loads(file.read_text())
    assert plan["config"]["model"]["remat"] == "none" and plan["config"]["data"]["seq_len"] == 64
    assert plan["devices"] == 16 and plan["chip"]["name"] == "h200" and plan["compiled"] == []
    total, active = parameter_counts(SMALL.model)
    assert (plan["parameters"], plan["active_parameters"]) == (total, active)
    best = plan["estimates"][0]
    name = ",".join(f"{axis}={size}" for axis, size in best["mesh"].items() if size > 1)
    trained = read_preset(preset, words[3:])
    assert trained.mesh.sizes == best["mesh"] == plan["best"] and trained.data.seq_len == 64
    assert f"Best estimate: {name}," in captured.out and "16 of h200, each 141 GB" in captured.out
    memory = best["memory"]
    assert memory["gradients"] == 2 * memory["parameters"]
    assert memory.pop("total") == sum(memory.values())


def test_given_meshes(capsys, preset):
    args = ["plan", preset, "--chip", "v5e", "--devices", "8"]
    assert main.main([*args, "--mesh", "fsdp=8", "--mesh", "fsdp=4,expert=2"]) == 0
    shown = capsys.readouterr().out
    assert "fsdp=8 " in shown and "fsdp=4, expert=2 " in shown and "more meshes" not in shown
    # The mesh flags of the config select one mesh.
    assert main.main([*args, "--mesh.fsdp", "2", "--mesh.data", "-1"]) == 0
    assert "Best estimate: data=4,fsdp=2," in capsys.readouterr().out


def test_nothing_fits(capsys, monkeypatch, preset):
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], memory=2e4))
    with pytest.raises(SystemExit) as left:
        main.main(["plan", preset, "--chip", "v5e", "--devices", "8"])
    assert left.value.code == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "more meshes, which do not fit" in shown and "Best" not in shown and "gptoss train" not in shown
    assert "No mesh fits in 90% of the memory. The closest is " in shown


def test_compiler_messages_are_shown(capsys):
    plan = make_plan(SMALL, chip="v5e", devices=8, meshes=["fsdp=8"])
    mesh = plan.estimates[0].mesh
    message = "Ran out of memory on HBM, temporaries (20.00G) exceeds available HBM (15.75G)."
    entries = [
        {
            "kind": "all-gather",
            "axes": ["fsdp"],
            "times": 24,
            "sent": 3.5e9,
            "trips_known": True,
            "across_slices": False,
        },
        {
            "kind": "all-reduce",
            "axes": ["fsdp"],
            "times": 7,
            "sent": 2e9,
            "trips_known": False,
            "across_slices": True,
        },
        {
            "kind": "all-to-all",
            "axes": ["fsdp"],
            "times": 3,
            "sent": 2e3,
            "trips_known": True,
            "across_slices": False,
        },
    ]
    sizes = dict(arguments=4_000_000_000, outputs=3_000_000_000, aliased=2_900_000_000, code=70_000_000)
    results = (
        (CompiledStep(mesh, seconds=65.0, **read_refusal(message)), ["in 65 s", "21.5", "16.9", message]),
        (
            CompiledStep(mesh, True, 65.0, **sizes, temporaries=8_000_000_000, collectives=entries),
            [
                "all-gather, sent",
                "24   3.50",
                "7+   2.00",
                "others, under 5 MB each",
                "12.2",
                "Best compiled: fsdp=8",
            ],
        ),
        (CompiledStep(mesh, True, 65.0, **sizes), ["this jaxlib cannot read"]),
    )
    for compiled, words in results:
        show(dataclasses.replace(plan, topology="v5e:2x4", compiled=[compiled]), Console(width=80))
        shown = capsys.readouterr().out
        assert [word for word in words if word not in " ".join(shown.split("\n"))] == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--chip", "v5q", "--devices", "4"], "did you mean v5p? known chips: v5e"),
        ([], "such as --topology v5p:4x4x4, or --chip h200 --devices 64"),
        (["--chip", "v5p"], "devices is None: --chip v5p also needs --devices"),
        (["--devices", "16"], "chip is None: --devices 16 also needs --chip"),
        (["--topology", "v5p-24"], "topology is 'v5p-24': give one of v5p-8, v5p-16, v5p-32, "),
        (["--chip", "v5p", "--devices", "0"], "devices is 0: must be above 0"),
        (["--topology", "v5p:2x2x2", "--chip", "v5p"], "already gives chip, devices and memory"),
        (
            ["--chip", "h200", "--devices", "8", "--mesh", "fsdp=3"],
            "must multiply to 8, the number of devices",
        ),
        (["--chip", "h200", "--devices", "8", "--json", "/nowhere/x.json"], "its folder does not exist"),
    ],
)
def test_errors_are_one_line(capsys, preset, args, words):
    assert main.main(["plan", preset, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gptoss: error: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_a_compiler_that_is_killed(monkeypatch):
    monkeypatch.setattr("gptoss_jax.planning.compile_tpu.has_tpu_compiler", lambda: True)
    killed = subprocess.CompletedProcess([], -signal.SIGTERM, stderr="E1129 raising signal 15")
    monkeypatch.setattr("gptoss_jax.planning.compile_tpu.subprocess.run", lambda *args, **options: killed)
    with pytest.raises(OSError, match="the compiler of v5e:2x2 was ended by SIGTERM$"):
        compile_step(SMALL, "v5e:2x2", mesh_of(4, 1, 1, 1))


def test_without_libtpu(capsys, monkeypatch, preset):
    monkeypatch.setattr("gptoss_jax.planning.compile_tpu.has_tpu_compiler", lambda: False)
    assert main.main(["plan", preset, "--topology", "v5e:2x2"]) == 2
    assert "pip install -e '.[tpu-compile]'" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "exchange"),
    [
        ("v5e:2x4", "fsdp=2,expert=2,tensor=2", "all-to-all"),
        ("v5p:2x2x1", "fsdp=2,expert=2", "ragged-all-to-all"),
    ],
)
def test_a_step_is_compiled(topology, mesh, exchange):
    # A width that the compiler does not pad.
    model = dataclasses.replace(SMALL.model, hidden_size=256, remat="none")
    config = dataclasses.replace(SMALL, model=model, data=DataConfig(seq_len=64, batch_size=16))
    plan = make_plan(config, topology=topology, meshes=[mesh])
    (one,), (guess,) = plan.compiled, plan.estimates
    assert one.fits and one.mesh == guess.mesh and one.refusal == ""
    # The state and the four arrays of a batch, up to the padding of the compiler's tiles.
    batch = 4 * 4 * 16 * 64 // math.prod(one.mesh[axis] for axis in ("data", "fsdp", "expert"))
    exact = guess.memory.parameters + guess.memory.optimizer + batch
    assert exact <= one.arguments < 4 * exact
    assert one.aliased > 0.9 * one.outputs and one.temporaries > 0 and one.total < plan.chip.memory
    if one.collectives is not None:
        sent = {
            (entry["kind"], tuple(entry["axes"])): entry["sent"]
            for entry in one.collectives
            if entry["trips_known"]
        }
        assert sent["all-gather", ("fsdp",)] > 0
        # Rows of bfloat16, in both directions, in two passes of each layer; half of them stay local.
        shards = math.prod(one.mesh[axis] for axis in ("data", "fsdp", "expert"))
        rows = 16 * 64 // shards * model.num_experts_per_tok
        plain = rows * 256 * 2 * 2 * 2 * model.num_hidden_layers / 2
        room = 1.0 if exchange == "ragged-all-to-all" else 1.5
        assert plain <= sent[exchange, ("expert",)] <= 1.1 * room * plain
        assert {axis for _, axes in sent for axis in axes} <= {
            axis for axis, size in one.mesh.items() if size > 1
        }


@needs_libtpu
def test_unknown_topologies():
    with pytest.raises(ValueError, match="topology is 'v5p:3x5x1': .*not divisible"):
        compile_step(SMALL, "v5p:3x5x1", mesh_of(15, 1, 1, 1))
