"""Whole runs: the loop, the run folder, stopping and resuming, and train.py's command line."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tokenizers
from helpers.xla_flags import FAST_COMPILE

from gptoss_jax.checkpoints.export import save_pretrained
from gptoss_jax.checkpoints.load import from_pretrained
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.checkpoints.run_params import load_run
from gptoss_jax.cli import main as cli
from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.data.token_cache import build_cache
from gptoss_jax.inference.sampling_params import Completion
from gptoss_jax.model.parameters import path_names
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.training import logging, loop, resume, setup
from gptoss_jax.training.console import Console
from gptoss_jax.training.logging import RunLog, next_command
from gptoss_jax.training.loop import train
from gptoss_jax.training.metrics import read_metrics
from gptoss_jax.training.profile import StepTracer
from gptoss_jax.training.state import create_params

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 24
# One device.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 40 documents of a made-up language, in one file."""
    words = ["ka", "lo", "mi", "teru", "sano", "wi", "pona", "jelo"]
    chosen = random.Random(0)
    stories = [" ".join(chosen.choices(words, k=chosen.randint(20, 90))) + ".\n" for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("<|endoftext|>\n".join(stories))
    return path


@pytest.fixture(scope="module")
def make_config(text, tmp_path_factory):
    cache_dir = str(tmp_path_factory.mktemp("cache"))

    def make(run_dir, **changes):
        values = dict(
            model=ModelConfig(
                vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
                num_experts_per_tok=2, sliding_window=8, max_position_embeddings=128, rope_theta=10000.0,
                rope_scaling=None, residual_dropout=0.1, router_aux_loss_coef=0.01,
            ),
            data=DataConfig(
                source=f"text:{text}", tokenizer="bytes", seq_len=32, batch_size=8, val_fraction=0.1,
                cache_dir=cache_dir,
            ),
            optim=OptimConfig(learning_rate=3e-3, warmup_steps=4, schedule="constant"),
            checkpoint=CheckpointConfig(every=6),
            eval=EvalConfig(every=12, batches=2, prompt="ka", sample_tokens=6),
            steps=STEPS,
            run_dir=str(run_dir),
        )  # fmt: skip
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A complete run on the 8 simulated devices: (config, final state)."""
    config = make_config(tmp_path_factory.mktemp("runs") / "whole")
    return config, train(config)


def results(run_dir):
    """Returns what must be bit-identical in two equivalent runs."""
    names = (
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "val_loss",
        "val_bits_per_byte",
        "tokens_seen",
        "expert_load",
    )
    return [
        {name: row.get(name) for name in names}
        for row in read_metrics(pathlib.Path(run_dir) / "metrics.jsonl")
    ]


def evaluations(run_dir):
    """Returns the metrics rows of the evaluations during training."""
    rows = read_metrics(pathlib.Path(run_dir) / "metrics.jsonl")
    return [row for row in rows if "val_loss" in row and not row.get("final")]


def test_a_run_learns_and_leaves_its_folder(finished):
    config, state = finished
    folder = pathlib.Path(config.run_dir)
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert int(state.step) == STEPS
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [12, STEPS, STEPS]
    assert evaluations[-1]["final"] and evaluations[-1]["xz_bits_per_byte"] > 0
    expected = {"data_wait_share", "logging_share", "tokens_per_second", "flops_per_second", "mfu", "epoch"}
    assert expected <= steps[-1].keys()
    assert np.allclose(np.sum(steps[-1]["expert_load"], axis=1), 1, atol=1e-3)
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert TrainConfig.load(folder / "config.json") == config


def test_the_last_and_the_best_checkpoints_are_kept(finished):
    config, _ = finished
    checkpoints = Checkpoints(config.run_dir, read_only=True)
    losses = {row["step"]: row["val_loss"] for row in evaluations(config.run_dir)}
    assert checkpoints.best_step == min(losses, key=losses.get)
    assert checkpoints.steps == sorted({18, 24, checkpoints.best_step})
    checkpoints.close()


def test_a_finished_run_is_reported_and_not_changed(finished, capsys):
    config, state = finished
    before = (pathlib.Path(config.run_dir) / "metrics.jsonl").read_bytes()
    again = train(config)
    assert "finished" in capsys.readouterr().out
    assert (pathlib.Path(config.run_dir) / "metrics.jsonl").read_bytes() == before
    for new, old in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(new, old)


def test_the_run_can_be_loaded(finished):
    config, state = finished
    loaded_config, params, tokenizer = load_run(config.run_dir, step=STEPS)
    assert loaded_config == config and tokenizer.vocab_size == 257
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(new, old)
    logits = from_pretrained(config.run_dir)(np.array([[256, 107, 97]], np.int32))
    assert logits.shape == (1, 3, 257)
    with pytest.raises(ValueError, match="no checkpoint for step 7; it has"):
        load_run(config.run_dir, step=7)


def test_a_different_config_in_the_same_folder_names_what_differs(finished, make_config):
    config, _ = finished
    other = make_config(config.run_dir, optim=dataclasses.replace(config.optim, learning_rate=1e-3), seed=3)
    with pytest.raises(
        ValueError, match=r"optim.learning_rate \(was 0.003, is 0.001\), seed \(was 0, is 3\)"
    ):
        train(other)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_resumes_exactly(finished, make_config, tmp_path, capsys):
    config = make_config(tmp_path / "stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"

    def stop_after_some_steps():
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 8:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_after_some_steps, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        train(config)
    assert left.value.code == 143
    assert "run the same command again" in capsys.readouterr().out
    stopped_at = read_metrics(metrics)[-1]["step"]
    assert 8 <= stopped_at < STEPS
    assert int(train(config).step) == STEPS
    assert f"Resuming from step {stopped_at}" in capsys.readouterr().out
    assert results(config.run_dir) == results(finished[0].run_dir)


def test_a_signal_stops_an_evaluation_which_the_resumed_run_repeats(
    make_config, tmp_path, monkeypatch, capsys
):
    small = {"steps": 2, "checkpoint": CheckpointConfig(every=9)}
    whole = make_config(tmp_path / "whole", eval=EvalConfig(every=9, batches=2, sample_tokens=0), **small)
    train(whole)
    num_calls, get = 0, jax.device_get

    def interrupted(tree):
        nonlocal num_calls
        if isinstance(tree, tuple):  # the sums of an evaluation batch
            num_calls += 1
            if num_calls == 3:  # the first batch of the evaluation on all held-out text
                os.kill(os.getpid(), signal.SIGINT)
        return get(tree)

    config = dataclasses.replace(whole, run_dir=str(tmp_path / "stopped"))
    monkeypatch.setattr(jax, "device_get", interrupted)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert num_calls == 3
    said = capsys.readouterr().out
    assert said.count("Stopped at step 2 of 2, which is saved in") == 1 and "gzip" not in said
    train(config)
    assert "This run is finished" in capsys.readouterr().out
    assert results(config.run_dir) == results(whole.run_dir)


@pytest.mark.slow
def test_a_run_that_trains_only_the_router_resumes(make_config, tmp_path):
    def is_router(path):
        return path[-1] in ("router", "router_bias")

    def config(name, steps):
        optim = OptimConfig(learning_rate=3e-3, warmup_steps=0, schedule="constant")
        evaluation = EvalConfig(every=2, batches=1, sample_tokens=0)
        return make_config(tmp_path / name, optim=optim, eval=evaluation, steps=steps)

    whole = train(config("whole", 4), is_trainable=is_router)
    train(config("resumed", 2), is_trainable=is_router)
    resumed = train(config("resumed", 4), is_trainable=is_router)
    losses, resumed_losses = (
        [row["loss"] for row in results(tmp_path / name) if row["loss"] is not None]
        for name in ("whole", "resumed")
    )
    assert len(losses) == 4 and losses == resumed_losses
    _, loaded, _ = load_run(tmp_path / "resumed", step=4)
    untrained = create_params(whole_config := config("whole", 4), make_mesh(whole_config.mesh))
    for path, leaf in jax.tree_util.tree_leaves_with_path(untrained):
        one, other, saved = (
            functools.reduce(lambda node, name: node[name], path_names(path), tree)
            for tree in (whole.params, resumed.params, loaded)
        )
        assert np.array_equal(one, other) and np.array_equal(one, saved)
        assert np.array_equal(one, leaf) != is_router(path_names(path))
    # The optimizer state does not fit other parameters; the checkpoints are kept.
    with pytest.raises(ValueError, match="of step 4 is of a run that trained other parameters"):
        train(config("resumed", 6))
    assert sorted(path.name for path in (tmp_path / "resumed/checkpoints").iterdir()) == ["2", "4"]


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(finished, make_config, tmp_path, capfd):
    config = make_config(tmp_path / "damaged")
    source = pathlib.Path(finished[0].run_dir)
    subprocess.run(["cp", "-r", source, config.run_dir], check=True)
    folder = pathlib.Path(config.run_dir) / "checkpoints"
    files = [path for path in (folder / "24").rglob("*") if path.is_file() and "params" in str(path)]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert int(train(config).step) == STEPS
    out, err = capfd.readouterr()
    assert "checkpoint of step 24 is damaged" in out and "Resuming from step 18" in out
    assert err == ""
    assert (folder / "damaged-24").is_dir() and (folder / "24").is_dir()
    assert results(config.run_dir) == results(source)


@pytest.fixture
def in_flight(monkeypatch):
    """Records the largest number of steps and evaluations in flight during training."""
    now, most = {"steps": 0, "evaluations": 0}, {"steps": 0, "evaluations": 0}

    def counted(make, kind):
        def make_counted(*args):
            program = make(*args)

            def dispatch(*inputs):
                now[kind] += 1
                most[kind] = max(most[kind], now[kind])
                return program(*inputs)

            return dispatch

        return make_counted

    def waited(tree):
        now["evaluations"] -= 1
        return wait(tree)

    def logged(self, *args):
        log_step(self, *args)
        now["steps"] -= 1

    wait, log_step = jax.block_until_ready, RunLog._log_step
    monkeypatch.setattr(loop, "make_train_step", counted(loop.make_train_step, "steps"))
    monkeypatch.setattr(loop, "make_eval_step", counted(loop.make_eval_step, "evaluations"))
    monkeypatch.setattr(jax, "block_until_ready", waited)
    monkeypatch.setattr(RunLog, "_log_step", logged)
    return most


@pytest.mark.slow
def test_more_steps_and_free_settings_give_the_same_result(
    finished, make_config, tmp_path, capsys, in_flight
):
    first = make_config(tmp_path / "run", steps=8)
    train(first)
    # A low loss on fewer batches, by chance.
    (tmp_path / "run/checkpoints/8/metrics/metrics").write_text('{"val_loss": 0.001}')
    # Many held-out batches, of which few may be in flight, and steps that are rarely logged.
    free = {"log_every": 5, "checkpoint": CheckpointConfig(7, 3)}
    now = make_config(tmp_path / "run", eval=EvalConfig(every=10, batches=3, sample_tokens=0), **free)
    capsys.readouterr()
    state = train(now)
    said = capsys.readouterr().out
    assert "steps is 24 (was 8): the steps so far equal those of a run of 24 steps" in said
    expected = "eval.batches is 3 (was 2): the best checkpoint is chosen among those evaluated on 3 batches"
    assert said.count("eval.batches") == 1 and expected in said
    assert next(line for line in said.splitlines() if "held-out" in line).endswith("best so far")
    losses = {row["step"]: row["val_loss"] for row in evaluations(tmp_path / "run") if row["step"] > 8}
    checkpoints = Checkpoints(tmp_path / "run", read_only=True, eval_batches=3)
    assert checkpoints.best_step == min(losses, key=losses.get)
    checkpoints.close()
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(finished[1].params), strict=True):
        assert np.array_equal(new, old)
    assert TrainConfig.load(tmp_path / "run" / "config.json") == now
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    logged = [row["step"] for row in rows if "loss" in row]
    assert logged == [1, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 24]
    assert in_flight == {"steps": 2, "evaluations": 1}
    with pytest.raises(ValueError, match="^steps is 9: must be above 24, the last step of the run$"):
        train(dataclasses.replace(now, steps=9))


def test_run_dir_that_cannot_be_written(make_config, tmp_path):
    (tmp_path / "file").touch()
    config = make_config(tmp_path / "file/run")
    with pytest.raises(ValueError, match=f"^run_dir is '{tmp_path}/file/run': {tmp_path}/file is a file$"):
        train(config)


def test_settings_that_a_resumed_run_may_change(finished, make_config):
    config = finished[0]
    changes = {
        "mesh": MeshConfig(fsdp=8), "eval": EvalConfig(1, 1, "x"), "checkpoint": CheckpointConfig(1, 9),
        "log_every": 7, "profile": "3:2", "steps": 99, "init_from": "elsewhere",
        "model": dataclasses.replace(config.model, remat="block"),
        "data": dataclasses.replace(config.data, cache_dir="/elsewhere"),
    }  # fmt: skip
    resume.check_run_dir(dataclasses.replace(config, **changes))
    for name, changed in [
        ("seed", {"seed": 1}),
        ("optim.grad_accum_steps", {"optim": dataclasses.replace(config.optim, grad_accum_steps=2)}),
        ("model.compute_dtype", {"model": dataclasses.replace(config.model, compute_dtype="bfloat16")}),
        ("data.val_fraction", {"data": dataclasses.replace(config.data, val_fraction=0.2)}),
    ]:
        with pytest.raises(ValueError, match=rf"made with another config: {name} \(was "):
            resume.check_run_dir(dataclasses.replace(config, **changes | changed))


@pytest.mark.parametrize(
    ("schedule", "before", "now", "message"),
    [
        ("constant", 10, 30, "steps is 30 (was 10): the steps so far equal those of a run of 30 steps"),
        ("wsd", 100, 30, "steps is 30 (was 100): the steps so far equal those of a run of 30 steps"),
        ("wsd", 20, 40, "steps is 40 (was 20): the wsd schedule jumps from a learning rate of 5.0e-2 at step "
         "20 to 1.0e-1 at step 21; the result differs from a run of 40 steps"),
        ("cosine", 20, 21, "steps is 21 (was 20): the cosine schedule jumps from a learning rate of 5.0e-2 at"
         " step 20 to 5.0e-2 at step 21; the result differs from a run of 21 steps"),
        ("cosine", 20, 20, None),
    ],
)  # fmt: skip
def test_changing_the_number_of_steps(make_config, tmp_path, schedule, before, now, message):
    optim = OptimConfig(learning_rate=0.1, warmup_steps=4, schedule=schedule, min_lr_ratio=0.5)
    said = []
    config = make_config(tmp_path, optim=optim, steps=now)
    # Checkpoints of older versions do not record whether the schedule jumped.
    record = {"config": {"steps": before}}
    jumps = resume.check_steps(config, record, 20, 20, said.append)
    assert said == ([] if message is None else [message])
    assert jumps == (message is not None and " jumps from " in message)
    # An earlier jump is remembered.
    said.clear()
    assert resume.check_steps(config, record | {"schedule_jumped": True}, 20, 20, said.append)
    assert ["the steps so far are also" in line for line in said] == ([] if message is None else [False])


def test_a_resumed_run_needs_no_init_from_and_remembers_a_schedule_jump(
    finished, make_config, tmp_path, monkeypatch, capsys
):
    run_dir, stops = tmp_path / "run", []
    shutil.copytree(finished[0].run_dir, run_dir)
    # As written by a run that started from weights with these stop tokens.
    (run_dir / "generation_config.json").write_text('{"eos_token_id": [97, 98, 256]}')

    def sample(model, prompts, params):
        stops.append(params.stop_tokens)
        return [Completion([97], None, "length")]

    monkeypatch.setattr(logging, "generate", sample)
    monkeypatch.setattr(resume, "check_steps", lambda *args: True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    train(make_config(run_dir, init_from="hf:nobody/nothing", steps=STEPS + 1))
    said = capsys.readouterr().out
    expected = "init_from is 'hf:nobody/nothing': not read, because the run resumes from its checkpoint"
    assert expected in said and stops == [(97, 98, 256)]
    record = json.loads((run_dir / f"checkpoints/{STEPS + 1}/record/metadata").read_text())
    assert record["schedule_jumped"] is True
    record = json.loads((run_dir / f"checkpoints/{STEPS}/record/metadata").read_text())
    assert record["schedule_jumped"] is False


def test_a_nonfinite_evaluation_is_never_the_best(finished, tmp_path, capsys):
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"))
    subprocess.run(["cp", "-r", finished[0].run_dir, config.run_dir], check=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    rows = [row | ({"val_loss": None} if "val_loss" in row else {}) for row in read_metrics(metrics)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A finished run reads its metrics again, and has no value for the last evaluation.
    train(config)
    assert "held-out loss   – nats per token" in capsys.readouterr().out
    run_log = RunLog(config, build_cache(config.data), Console(), STEPS, 0)
    for step, loss in ((1, math.nan), (2, 3.0), (3, math.inf), (4, 2.5), (5, 2.75)):
        run_log.evaluation(step, {"loss": loss})
    run_log.close()
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("best so far") for line in said] == [False, True, False, True, False]


@pytest.mark.slow
def test_persistently_nonfinite_loss_stops_the_run(make_config, tmp_path, capsys):
    config = make_config(
        tmp_path / "nan", optim=OptimConfig(learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0), steps=60
    )
    with pytest.raises(FloatingPointError, match="not finite in 20 steps in a row"):
        train(config)
    assert "skipped: loss" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "nan" / "metrics.jsonl")
    assert rows[-1]["loss"] is None and rows[-1]["skipped_steps"] >= 19


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"vocab_size": 200}}, r"model.vocab_size is 200: must be at least 257"),
        ({"data": {"seq_len": 129}}, r"data.seq_len is 129: must be at most model.max_position_embeddings"),
        ({"data": {"batch_size": 12}}, r"batch_size is 12: must be a multiple of 8, the number of devices"),
        ({"data": {"batch_size": 24}, "optim": {"grad_accum_steps": 2}}, r"16, .* \(8\) times .*\(2\)"),
        ({"mesh": {"data": 3}}, r"axis sizes must multiply to 8, the number of devices"),
        ({"init_from": "nowhere"}, r"nowhere: no such folder"),
    ],
)
def test_incompatible_settings(make_config, tmp_path, changes, message):
    values = make_config(tmp_path / "bad").to_dict()
    for name, part in changes.items():
        values[name] = values[name] | part if isinstance(part, dict) else part
    with pytest.raises(ValueError, match=message):
        train(TrainConfig.from_dict(values))


@pytest.mark.slow
def test_dropped_rows_are_in_the_metrics(finished, make_config, tmp_path):
    model = dataclasses.replace(finished[0].model, expert_capacity_factor=0.5)
    train(make_config(tmp_path / "run", model=model, steps=2, eval=EvalConfig(sample_tokens=0)))
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    # With all experts full, half of the rows are accepted.
    assert len(rows) == 2 and all(0.5 <= row["dropped_share"] < 0.8 for row in rows)
    plain = read_metrics(pathlib.Path(finished[0].run_dir) / "metrics.jsonl")
    assert not any("dropped_share" in row for row in plain)


@pytest.mark.slow
def test_initialization_from_a_run(finished, make_config, tmp_path):
    config = make_config(
        tmp_path / "second", init_from=finished[0].run_dir, steps=2, eval=EvalConfig(sample_tokens=0)
    )
    state = train(config)
    first = read_metrics(tmp_path / "second" / "metrics.jsonl")[0]
    assert first["loss"] < results(finished[0].run_dir)[0]["loss"] - 0.3 and int(state.step) == 2
    values = config.to_dict()
    values["model"]["intermediate_size"] = 40
    values["run_dir"] = str(tmp_path / "third")
    with pytest.raises(
        ValueError, match=r"init_from .* do not fit the model: model.intermediate_size is 40, theirs "
    ):
        train(TrainConfig.from_dict(values))


@pytest.mark.slow
def test_initialization_from_published_weights(finished, make_config, tmp_path):
    folder, runs = finished[0].run_dir, {}
    save_pretrained(from_pretrained(folder), tmp_path / "published", experts="float32")
    for name in (folder, str(tmp_path / "published")):
        run_dir = tmp_path / f"from {pathlib.Path(name).name}"
        train(make_config(run_dir, init_from=name, steps=2, eval=EvalConfig(sample_tokens=0)))
        runs[name] = results(run_dir)
    assert runs[folder] == runs[str(tmp_path / "published")]
    # Published files store each layer separately, so they also load into a model with unstacked layers; a run
    # does not.
    apart = dataclasses.replace(finished[0].model, scan_layers=False)
    options = {"model": apart, "steps": 2, "eval": EvalConfig(sample_tokens=0)}
    train(make_config(tmp_path / "apart", init_from=str(tmp_path / "published"), **options))
    for row, expected in zip(results(tmp_path / "apart"), runs[folder], strict=True):
        name = "loss" if row["loss"] is not None else "val_loss"
        assert row[name] == pytest.approx(expected[name], rel=1e-5)
    with pytest.raises(ValueError, match="model.scan_layers is False, theirs True"):
        train(make_config(tmp_path / "refused", init_from=folder, **options))


@pytest.mark.slow
def test_published_weights_must_match_the_config(finished, make_config, tmp_path, capsys):
    save_pretrained(from_pretrained(finished[0].run_dir), tmp_path / "published")
    config = make_config(tmp_path / "run", init_from=str(tmp_path / "published"), steps=1)
    values = config.to_dict()
    values["model"] |= {"hidden_size": 18, "rope_theta": 9000.0}
    with pytest.raises(ValueError, match=r"model.hidden_size is 18, theirs 16; model.rope_theta is 9000"):
        train(TrainConfig.from_dict(values))
    values["model"]["hidden_size"] = 16
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "published" / file).unlink()
    train(TrainConfig.from_dict(values))
    said = capsys.readouterr().out
    assert "were trained with a different setting: model.rope_theta is 9000.0, theirs 10000.0" in said
    assert "has no tokenizer" in said


def command(config, preset, **popen):
    values = config.to_dict()
    preset.write_text(
        f"from gptoss_jax.config import TrainConfig\nconfig = TrainConfig.from_dict({values!r})\n"
    )
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(preset)],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen,
    )  # fmt: skip


@pytest.mark.slow
def test_rerunning_after_kill_9_gives_the_same_losses(make_config, tmp_path):
    whole, killed = make_config(tmp_path / "whole"), make_config(tmp_path / "killed")
    reference = command(whole, tmp_path / "whole.py")
    out, err = reference.communicate(timeout=200)
    assert reference.returncode == 0, err
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for rows in (3, 10, 17):
        process = command(killed, tmp_path / "killed.py")
        while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < rows):
            time.sleep(0.002)
        process.kill()
        process.communicate()
    process = command(killed, tmp_path / "killed.py")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert results(killed.run_dir) == results(whole.run_dir)
    assert "gptoss generate" in out and "xz -9" in out


COMMANDS = """
import json, pathlib, sys
from gptoss_jax.cli import main as cli
generate, run, source = json.loads(sys.argv[1])
codes = [cli.main(generate)]
for path in pathlib.Path(run, "checkpoints", "2", "params").rglob("*"):
    if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
for command in (generate, ["convert", run, run + "-out"], ["eval", run, "--source", source]):
    codes.append(cli.main(command))
sys.exit(f"codes {codes}")
"""


@pytest.mark.slow
def test_the_printed_command_works_and_damage_is_one_line(make_config, text, tmp_path):
    # The model's context, 128, is shorter than the default number of new tokens.
    run_dir = tmp_path / "it's [x]*\n$(ü) \"&"
    config = make_config(run_dir, steps=2, eval=EvalConfig(prompt="-k'a", sample_tokens=0))
    process = command(config, tmp_path / "preset.py")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    printed = out.split("Next: gptoss ")[1].rstrip("\n")
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {printed}"], capture_output=True, text=True, check=True
    )
    generate = words.stdout.split("\0")[:-1]
    assert generate == ["generate", str(run_dir), "--prompt=-k'a"]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([generate, str(run_dir), f"text:{text}"])],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    speed, *errors, codes = done.stderr.splitlines()
    assert codes == "codes [0, 2, 2, 2]" and done.stdout.startswith("-k'a")
    assert " tokens · " in speed and len(errors) == 3
    assert all(
        line.startswith("gptoss: error: ") and "/2: cannot be read (params: " in line for line in errors
    )


@pytest.mark.parametrize(
    ("run_dir", "prompt", "words"),
    [
        ("runs/a", "The ", "gptoss generate runs/a --prompt 'The '"),
        ("-x y", "-n", "gptoss generate './-x y' --prompt=-n"),
        ("-x y", None, "gptoss chat './-x y'"),
    ],
)
def test_next_command(run_dir, prompt, words):
    assert next_command(pathlib.Path(run_dir), prompt) == words


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_exit_code_1(make_config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk of its own needs the right to mount one")
    try:
        process = command(make_config(disk / "run"), tmp_path / "full.py")
        _, err = process.communicate(timeout=200)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1 and err.startswith("train.py: error: ")
    assert "could not be written: it needs" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model.hiden-size", "3"], "hidden-size"),
        (["--steps", "many"], "steps"),
        (["--steps", "0"], "steps is 0: must be above 0"),
        (["--model.num-experts-per-tok", "9"], "model.num_experts_per_tok is 9: must be at most"),
        (
            ["configs/nothing.py"],
            "configs/nothing.py': no such file or preset; the presets are gpt_oss",
        ),
        (["--data.source", "text:/nowhere/*.txt"], "/nowhere/*.txt"),
    ],
)
def test_bad_command_lines(arguments, message):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments, "--run-dir", "/nowhere/run"],
        capture_output=True, text=True, env=environment, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr + done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[str(ROOT / "train.py")], ["-m", "gptoss_jax", "train"]])
def test_help_explains_every_field(command, tmp_path):
    done = subprocess.run(
        [sys.executable, *command, "--help"], capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0
    name = "gptoss train" if "-m" in command else "python train.py"
    for words in (
        f"usage: {name} [PRESET] [-h]",
        f"  {name} tinystories --steps 500",
        "sft_qlora_20b",
        "--data.seq-len",
        "Tokens per row",
        "--model.num-hidden-layers",
        "--optim.learning-rate",
        "--run-dir",
        "runs/quickstart)",
    ):
        assert words in done.stdout


def test_gptoss_train(make_config, tmp_path, capsys):
    preset, run = tmp_path / "preset.py", tmp_path / "run"
    values = make_config(run).to_dict()
    preset.write_text(f"from gptoss_jax.config import *\nconfig = TrainConfig.from_dict({values!r})\n")
    assert cli.main(["train", str(preset), "--steps", "2"]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {1, 2}
    capsys.readouterr()
    assert cli.main(["train", "no-preset"]) == 2
    assert capsys.readouterr().err.startswith("gptoss: error: config is 'no-preset': no such file or preset;")


def test_metrics_are_json_lines(finished):
    for line in (pathlib.Path(finished[0].run_dir) / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)


def traced_steps(folder):
    """Returns the numbers of the steps in each trace of a folder."""
    traces = []
    for path in sorted(pathlib.Path(folder).rglob("*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        traces.append(sorted({dict(event.stats)["step_num"] for event in events if event.name == "train"}))
    return traces


def test_the_profile_has_the_steps_that_were_asked_for(make_config, tmp_path, capsys):
    run = tmp_path / "run"
    train(make_config(run, steps=5, profile="3:2", eval=EvalConfig(every=9, sample_tokens=0)))
    assert traced_steps(run / "profile") == [[3, 4]]
    assert f"Profile of steps 3 to 4: tensorboard --logdir {run}/profile" in capsys.readouterr().out


def test_a_resumed_run_traces_the_rest_of_the_steps_without_the_first(make_config, tmp_path):
    config = make_config(tmp_path / "run", steps=3, eval=EvalConfig(every=99, sample_tokens=0))
    train(config)
    train(dataclasses.replace(config, steps=6, profile="2:4"))
    assert traced_steps(tmp_path / "run/profile") == [[5]]
    train(dataclasses.replace(config, steps=7, profile="2:4"))
    assert len(traced_steps(tmp_path / "run/profile")) == 1


def test_a_run_that_ends_early_writes_its_profile(make_config, tmp_path, capsys):
    config = make_config(tmp_path / "run", profile="2:9")
    with pytest.raises(ZeroDivisionError), StepTracer(config, lambda step: (1 // step, 0), 0, print) as step:
        for number in (2, 1, 0):
            step(number)
    assert traced_steps(tmp_path / "run/profile") == [[2, 3]]
    assert capsys.readouterr().out.startswith("Profile of steps 2 to 3: ")


def test_each_process_writes_its_own_profile(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with StepTracer(make_config(tmp_path / "run", profile="2:1"), lambda x: (x, x), 0, print) as step:
        step(1)
        step(1)
    assert traced_steps(tmp_path / "run/profile/process_1") == [[2]]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("10", "must be START:COUNT, the first step and the number of steps, such as 10:3"),
        ("10:x", "must be START:COUNT"),
        ("-2:3", "must be START:COUNT"),
        ("10:0", "must be START:COUNT"),
        ("1:3", "must start at step 2 or later, because step 1 compiles"),
        ("23:3", r"must end at or before the last step \(24\)"),
    ],
)
def test_profiles_that_are_not_allowed(make_config, tmp_path, profile, message):
    with pytest.raises(ValueError, match=f"^profile is '{profile}': {message}"):
        make_config(tmp_path, profile=profile)


def test_changed_text_is_rejected(finished, make_config, text, tmp_path):
    config = make_config(tmp_path / "copy")
    subprocess.run(["cp", "-r", finished[0].run_dir, config.run_dir], check=True)
    before = (tmp_path / "copy" / "tokenizer_name.txt").read_text()
    text.write_text(text.read_text() + "<|endoftext|>\nka lo mi.\n")
    try:
        with pytest.raises(ValueError, match=r"the data has changed since .* began \(documents, tokens"):
            train(config)
    finally:
        text.write_text(text.read_text().removesuffix("<|endoftext|>\nka lo mi.\n"))
    assert (tmp_path / "copy" / "tokenizer_name.txt").read_text() == before


def test_weights_of_another_tokenizer_are_rejected(finished, make_config, tmp_path):
    config = make_config(tmp_path / "other", init_from=finished[0].run_dir)
    values = config.to_dict()
    words = {"<|endoftext|>": 0, "ka": 1, "?": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values["data"]["tokenizer"] = f"file:{tmp_path}/tokenizer.json"
    other = f"data.tokenizer is 'file:{tmp_path}/tokenizer.json': must match init_from, which uses bytes"
    with pytest.raises(ValueError, match=other):
        train(TrainConfig.from_dict(values))


def test_two_processes_do_not_train_in_one_folder(make_config, tmp_path):
    config = make_config(tmp_path / "twice")
    with (
        setup.lock_run_dir(tmp_path / "twice"),
        pytest.raises(ValueError, match="another process is training there"),
    ):
        train(config)


@pytest.mark.slow
def test_samples_of_ids_without_a_token(make_config, tmp_path, capsys):
    model = dataclasses.replace(make_config("x").model, vocab_size=2000)
    sampling = EvalConfig(every=1, batches=1, sample_tokens=12, temperature=5.0)
    config = make_config(tmp_path / "wide", model=model, eval=sampling, steps=1)
    assert int(train(config).step) == 1
    assert "│" in capsys.readouterr().out


def test_memory_of_other_programs_is_released(make_config, tmp_path, monkeypatch):
    """After the first step, which compiles, around each evaluation and checkpoint, and after a step that
    needs more than the second one."""
    current, released, find_pending = [], [], loop._pending_evaluations
    monkeypatch.setattr(loop.host_memory, "release", lambda: released.append(current[-1]))
    sizes = {3: 1051, 4: 1050}  # after steps 4 and 5; the limit is 1050
    monkeypatch.setattr(loop.host_memory, "resident_bytes", lambda: sizes.get(current[-1], 1000))

    def pending(step, *arguments):
        current.append(step)
        return find_pending(step, *arguments)

    monkeypatch.setattr(loop, "_pending_evaluations", pending)
    often = {"checkpoint": CheckpointConfig(3, 2), "eval": EvalConfig(every=5, batches=1, sample_tokens=0)}
    train(make_config(tmp_path / "run", steps=6, **often))
    assert released == [0, 3, 3, 3, 5, 5, 6, 6]
