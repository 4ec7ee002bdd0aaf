"""`gptoss plan --inference`: bytes against real arrays, a running engine and compiled programs."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import pytest

from gptoss_jax.checkpoints.load import load_target
from gptoss_jax.cli import main
from gptoss_jax.config import MeshConfig, ModelConfig
from gptoss_jax.config.preset import read_preset
from gptoss_jax.inference import slots
from gptoss_jax.inference.engine import Engine
from gptoss_jax.inference.sampling_params import SamplingParams
from gptoss_jax.model.parameters import tree_bytes
from gptoss_jax.model.transformer import bind, init_params
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.planning.inference import Workload, plan_inference

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_local_experts=12,
    num_experts_per_tok=3,
    sliding_window=64,
    max_position_embeddings=4096,
)


def memory_of(model, chip, mesh="data=1", devices=1, experts="mxfp4", **workload):
    plan = plan_inference(
        model, chip=chip, devices=devices, meshes=[mesh], experts=experts, workload=Workload(**workload)
    )
    return plan.estimates[0].memory


def on_one_device(tree) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("experts", "sizes"),
    [
        ("mxfp4", (1, 1, 1, 1)),
        ("mxfp4", (1, 1, 2, 2)),
        ("bfloat16", (1, 2, 1, 2)),
        ("bfloat16", (2, 1, 4, 1)),
    ],
)
def test_bytes_match_real_arrays(experts, sizes):
    config = dataclasses.replace(SMALL, expert_format="mxfp4" if experts == "mxfp4" else "plain")
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    devices = math.prod(sizes)
    axes = dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    text = ",".join(f"{axis}={size}" for axis, size in axes.items())
    memory = memory_of(SMALL, "h100", text, devices, experts, slots=8, context=1000)
    target = load_target(config, mesh, "bfloat16")
    assert memory.weights == sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(target)
    )
    with jax.set_mesh(mesh):
        state = slots.init_slots(config, 8, 1024)
        row = slots.init_row(config, 1024)
    assert memory.cache == on_one_device(state)
    assert memory.prompts in (8 * on_one_device(row.layers), 7 * on_one_device(row.layers))


def test_an_engine_holds_less():
    """The arrays that are alive while four prompts are read and answered, up to the whole context."""
    config = dataclasses.replace(SMALL, expert_format="mxfp4")
    params = init_params(config, jax.random.key(0))
    others = tree_bytes(jax.live_arrays()) - tree_bytes(params)
    engine = Engine(bind(config, params), num_slots=4, prefix_cache_bytes=1 << 20)
    for i in range(4):
        engine.submit([i] * 900, SamplingParams(max_new_tokens=40))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, tree_bytes(jax.live_arrays()) - others)
    memory = memory_of(SMALL, "cpu", slots=4, context=1000, prefix_cache_bytes=1 << 20)
    held = memory.total - memory.temporaries
    assert 0.6 * held < most <= held


@pytest.mark.parametrize("experts", ["mxfp4", "bfloat16"])
def test_temporaries_of_compiled_programs(experts):
    """On CPU the larger of the two programs takes between a third and all of the estimate."""
    model = dataclasses.replace(SMALL, compute_dtype="float32")
    config = dataclasses.replace(model, expert_format="mxfp4" if experts == "mxfp4" else "plain")
    params = load_target(config, None, "float32", None if experts == "mxfp4" else "bfloat16")
    params, state, row = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (params, *jax.eval_shape(lambda: (slots.init_slots(config, 1, 1024), slots.init_row(config, 1024)))),
    )

    def array(*shape, dtype="int32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    flags = array(1, dtype="bool")
    decode = slots.decode.lower(
        config, params, state, array(), array(*state.requests.stop_mask.shape), (flags, flags)
    )
    tokens = array(1, 512)
    prefill = slots.prefill.lower(
        config, params, [row], tokens, tokens, array(1), batch=1, has_logprobs=False
    )
    needed = max(one.compile().memory_analysis().temp_size_in_bytes for one in (decode, prefill))
    estimated = memory_of(model, "cpu", experts=experts, slots=1, context=1024).temporaries
    assert estimated / 3 < needed <= estimated


def test_peaks_of_the_tpu_compiler():
    """Decoding with gpt-oss-20b as benchmarks/tpu_compile.py compiled it: within 8 % of the peak."""
    rows = json.loads((ROOT / "benchmarks/results/tpu_compile.json").read_text())
    model = read_preset(ROOT / "configs/gpt_oss_20b.py").model
    found = 0
    for row in rows:
        if "decoding" not in row["program"] or "peak" not in row:
            continue
        batch, devices = map(int, re.search(r"batch (\d+), (\d+) device", row["program"]).groups())
        context = 32768 if "cache of 32,768" in row["program"] else 4096
        memory = memory_of(
            model, row["chip"], f"tensor={devices}", devices,
            slots=batch, context=context, prefix_cache_bytes=0,
        )  # fmt: skip
        held = memory.weights + memory.cache + memory.temporaries
        assert held == pytest.approx(row["peak"], rel=0.08), row["program"]
        found += 1
    assert found == 12


def test_command(capsys, tmp_path):
    preset, file = tmp_path / "small.py", tmp_path / "plan.json"
    fields = f"TrainConfig.from_dict({{'model': {SMALL.to_dict()}}})"
    preset.write_text(f"from gptoss_jax.config import TrainConfig\nconfig = {fields}")
    args = ["plan", str(preset), "--inference"]
    assert main.main([*args, "--chip", "h100", "--slots", "2", "--context", "512", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "2 slots of 512 tokens, experts in MXFP4" in shown and "Best: data=1," in shown
    assert max(map(len, shown.splitlines())) <= 80
    plan = json.loads(file.read_text())
    memory = plan["estimates"][0]["memory"]
    assert memory.pop("total") == sum(memory.values()) and plan["fits"]
    assert main.main([*args, "--chip", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "1 slot of 4,096 tokens" in shown and "GB of free memory" in shown
    large = ["plan", str(ROOT / "configs/gpt_oss_120b.py"), "--inference", "--chip", "v5e"]
    with pytest.raises(SystemExit) as left:
        main.main(large)
    assert left.value.code == 1 and "No mesh fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--inference"], "chip is None: give one"),
        (["--inference", "--topology", "v5e:2x2"], "topology is 'v5e:2x2': give --chip"),
        (["--inference", "--chip", "h100", "--context", "200000"], "must be from 2 to 131072"),
        (["--inference", "--chip", "h100", "--slots", "0"], "slots is 0: must be 1 or more"),
        (["--inference", "--chip", "cpu", "--devices", "2"], "devices is 2: must be 1 with --chip cpu"),
        (["--inference", "--chip", "h100", "--devices", "7", "--mesh", "tensor=7"], "mesh.tensor is 7"),
        (["--chip", "h100", "--devices", "1", "--slots", "2"], "slots is 2: only applies with --inference"),
    ],
)
def test_arguments_that_are_refused(args, words, capsys):
    assert main.main(["plan", str(ROOT / "configs/gpt_oss_20b.py"), *args]) == 2
    assert words in capsys.readouterr().err
