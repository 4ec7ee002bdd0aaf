"""Multi-process runs: real processes on this machine, connected by Gloo."""

import dataclasses
import os
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from helpers.processes import ROOT, start_all, start_one, wait_for_exit

from gptoss_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from gptoss_jax.parallel import distributed
from gptoss_jax.training.metrics import read_metrics

STEPS = 24
LOST = "process {} of {} lost contact with another process, which failed or was killed"


def losses(folder):
    """Returns a dict: (step, is training, is the final evaluation) -> loss."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        (row["step"], "loss" in row, "final" in row): row.get("loss", row.get("val_loss")) for row in rows
    }


def wait_for_rows(folder, count, started):
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in started), wait_for_exit(started)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The outputs of a run of one process with 8 devices, and of a run that starts with two processes of 4
    devices, is killed, resumes with two of 2, is stopped, and ends with one of 4."""
    folder = tmp_path_factory.mktemp("processes")
    words, chosen = ["ka", "lo", "mi", "teru", "sano"], random.Random(0)
    stories = [" ".join(chosen.choices(words, k=chosen.randint(20, 90))) + ".\n" for _ in range(40)]
    (folder / "stories.txt").write_text("<|endoftext|>\n".join(stories))
    model = ModelConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=128, rope_theta=10000.0, rope_scaling=None, residual_dropout=0.1,
        router_aux_loss_coef=0.01,
    )  # fmt: skip
    data = DataConfig(
        f"text:{folder}/*.txt", "bytes", seq_len=32, batch_size=16, cache_dir=str(folder / "cache")
    )
    whole = TrainConfig(
        model=model, data=data, mesh=MeshConfig(expert=4), steps=STEPS, run_dir=str(folder / "whole"),
        optim=OptimConfig(learning_rate=3e-3, warmup_steps=4, grad_accum_steps=2),
        checkpoint=CheckpointConfig(every=5), eval=EvalConfig(every=1000, sample_tokens=0),
    )  # fmt: skip

    def line(name, **changes):
        preset = folder / f"{name}.py"
        values = dataclasses.replace(whole, run_dir=str(folder / name), **changes).to_dict()
        preset.write_text(
            f"from gptoss_jax.config import TrainConfig\nconfig = TrainConfig.from_dict({values!r})\n"
        )
        return [sys.executable, str(ROOT / "train.py"), str(preset)]

    reference, broken = start_one(line("whole"), devices=8), folder / "broken"
    found = {"folder": folder}
    pair = start_all(line("broken"), devices=4)
    wait_for_rows(broken, 8, pair)
    pair[1].kill()
    began = time.monotonic()
    pair[0].wait(timeout=60)
    found["seconds"] = time.monotonic() - began
    found["killed"] = wait_for_exit(pair)
    found["first"] = losses(broken)
    (found["whole"],) = wait_for_exit([reference])
    # The axes have other sizes, too. A checkpoint of every step makes steps take long enough for the signal,
    # which JAX looks for once per second, to arrive before the last one.
    changes = {"mesh": MeshConfig(fsdp=2, expert=2), "checkpoint": CheckpointConfig(every=1)}
    pair = start_all(line("broken", **changes), devices=2)
    while "Resuming" not in (resumed := pair[0].stdout.readline()):
        assert resumed, wait_for_exit(pair)
    pair[1].send_signal(signal.SIGTERM)
    found["resumed"], found["stopped"] = resumed, wait_for_exit(pair)
    found["second"] = losses(broken)
    (found["end"],) = wait_for_exit([start_one(line("broken", mesh=MeshConfig(data=2, tensor=2)), devices=4)])
    found["third"] = losses(broken)
    return found


@pytest.mark.slow
def test_two_processes_match_one(runs):
    assert runs["whole"][0] == 0, runs["whole"][2]
    whole = losses(runs["folder"] / "whole")
    assert len(runs["first"]) >= 8
    np.testing.assert_allclose(
        list(runs["first"].values()), [whole[step] for step in runs["first"]], rtol=0, atol=2e-6
    )


@pytest.mark.slow
def test_a_killed_process_ends_the_other(runs):
    (code, out, err), (killed, silent, _) = runs["killed"]
    assert killed == -signal.SIGKILL and runs["seconds"] < 60
    assert_lost(code, err, 0)
    assert "on     8 × cpu" in out and "Gloo" not in out and silent == ""


@pytest.mark.slow
def test_resumes_on_another_mesh_and_stops_after_a_signal_to_one_process(runs):
    (code, out, err), (other, silent, silence) = runs["stopped"]
    assert (code, other) == (143, 143) and err == "train.py: terminated\n" and silent == ""
    caught, last = silence.splitlines()
    assert "SIGTERM caught" in caught and last == "train.py: terminated"
    stopped_at = max(step for step, *_ in runs["second"])
    assert "Resuming from step 5" in runs["resumed"] and 5 < stopped_at < STEPS
    assert f"Stopped at step {stopped_at} of {STEPS}" in out
    code, out, err = runs["end"]
    assert code == 0, err
    assert f"Resuming from step {stopped_at}" in out
    assert "on     4 × cpu (data 2 × tensor 2)" in out


@pytest.mark.slow
def test_a_run_on_many_meshes_has_the_losses_of_one(runs):
    whole = losses(runs["folder"] / "whole")
    assert runs["third"].keys() == whole.keys() and len(whole) == STEPS + 2
    np.testing.assert_allclose(
        list(runs["third"].values()), [whole[step] for step in runs["third"]], rtol=0, atol=1e-4
    )


DEMO = """
import pathlib, sys, time
from gptoss_jax import startup
from gptoss_jax.config import TrainConfig
from gptoss_jax.parallel import distributed

def message_of(check, *arguments):
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)

def main():
    with distributed.distributed_session("demo"):
        import jax
        from gptoss_jax.training import setup

        index, mode, folder = jax.process_index(), sys.argv[1], pathlib.Path(sys.argv[2])
        values = distributed.allgather_host([index, "x" * index])
        assert values == [[i, "x" * i] for i in range(jax.process_count())]
        distributed.barrier()
        distributed.barrier()
        print(f"{index} of {jax.process_count()}", flush=True)
        if mode == "checks":
            setup.SHARED_FOLDER_TIMEOUT = 0.5
            (folder / str(index)).mkdir(parents=True, exist_ok=True)
            print(message_of(setup.check_shared, folder), flush=True)
            print(message_of(setup.check_shared, folder / str(index)), flush=True)
            print(message_of(setup.check_same_config, TrainConfig(seed=index)), flush=True)
        if mode == "all":
            raise ValueError("wrong everywhere")
        if mode == "one" and index == 1:
            raise OSError("wrong in one")
        if mode == "leave" and index == 1:
            raise SystemExit(1)
        while mode in ("one", "leave", "kill", "suspend"):
            distributed.allgather_host(None)
            time.sleep(0.01)

sys.exit(startup.run(main, "demo"))
"""


def start_demo(mode, folder, count=2):
    return start_all([sys.executable, "-u", "-c", DEMO, mode, str(folder)], count=count)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """mode -> (exit code, stdout, stderr) of each process."""
    folder = tmp_path_factory.mktemp("demo")
    started = {mode: start_demo(mode, folder) for mode in ("checks", "all", "one", "leave", "kill")}
    victim = started["kill"][0]
    assert victim.stdout.readline() == "0 of 2\n"
    victim.kill()
    return {mode: wait_for_exit(pair) for mode, pair in started.items()}


def test_every_process_reports_its_own_error(demos):
    assert [code for code, _, _ in demos["all"]] == [2, 2]
    errors = [err for _, _, err in demos["all"]]
    assert errors == ["demo: error: wrong everywhere\n", "demo: process 1 of 2: error: wrong everywhere\n"]


def test_an_error_in_one_process_ends_the_others(demos):
    (code, _, err), (own_code, _, own_err) = demos["one"]
    assert (code, own_code) == (1, 1) and own_err == "demo: process 1 of 2: error: wrong in one\n"
    assert err.startswith(f"demo: error: {LOST.format(0, 2)}") and err.count("\n") == 1


def test_a_process_that_leaves_ends_the_others(demos):
    (code, _, err), (own_code, _, own_err) = demos["leave"]
    assert (code, own_code) == (1, 1) and own_err == ""
    assert_lost(code, err, 0)


def test_killing_process_0_ends_the_others(demos):
    (_, (code, _, err)) = demos["kill"]
    assert (code == 1 and LOST.format(1, 2) in err) or (
        code == -signal.SIGABRT and "another task died" in err
    )


def assert_lost(code, err, index):
    """Asserts that a process ended because it lost the other one: by an error from Gloo, which notices a
    closed connection, or by JAX's coordination service, which aborts. Either may come first."""
    if code == -signal.SIGABRT:
        assert "another task died" in err
    else:
        assert code == 1 and LOST.format(index, 2) in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_suspended_process_ends_the_others(tmp_path):
    processes = start_demo("suspend", tmp_path, count=3)
    assert processes[0].stdout.readline() == "0 of 3\n"
    processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    codes = [process.wait(timeout=90) for process in (processes[0], processes[2])]
    assert all(codes) and time.monotonic() - began < 60
    processes[1].kill()
    (_, _, err), _, _ = wait_for_exit(processes)
    assert "stopped sending heartbeats" in err


def test_settings_must_be_the_same_in_all_processes(demos):
    (code, out, err), (other, silent, _) = demos["checks"]
    assert (code, other) == (0, 0) and silent == "", err
    first, shared, not_shared, seed = out.splitlines()
    assert (first, shared) == ("0 of 2", "None")
    assert "does not see files that process 0 writes there; it must be on storage that all" in not_shared
    assert seed == (
        "seed is 1 in process 1 and 0 in process 0: all processes must be started with the same settings"
    )


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI")
def test_mpirun(tmp_path):
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-u", "-c", DEMO]
    ((code, out, err),) = wait_for_exit([start_one([*mpirun, "all", str(tmp_path)])])
    assert code == 2 and out.count("0 of 2\n") == 1 and "1 of 2\n" not in out
    assert err.count("demo: error: wrong everywhere") == 1


BY_HAND = {"JAX_COORDINATOR_ADDRESS": "here:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


LAUNCHERS = ("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_", "TPU_")


@pytest.fixture
def environment(monkeypatch):
    """Sets environment variables; None removes one."""
    for name in os.environ:
        if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS", *LAUNCHERS)):
            monkeypatch.delenv(name)

    def change(variables):
        for name, value in variables.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        BY_HAND | {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # In the batch script itself, without srun.
        SLURM | {"SLURM_STEP_NODELIST": None},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        # A pod that is not part of a job.
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_single_process_does_not_initialize_jax_distributed(environment, variables):
    environment(variables)
    with distributed.distributed_session("demo"):
        assert not jax.distributed.is_initialized()
        assert distributed.allgather_host(3) == [3]
        distributed.barrier()
        assert not distributed.stop_requested(1)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (BY_HAND, {"coordinator_address": "here:1234", "num_processes": 2, "process_id": 0}),
        (SLURM, {}),
        (OPEN_MPI, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, {}),
    ],
)
def test_several_processes_initialize_jax_distributed(environment, monkeypatch, variables, named):
    environment(variables)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    assert distributed._initialize()
    ((arguments),) = calls
    assert arguments.pop("heartbeat_timeout_seconds") < 60 and arguments.pop("shutdown_timeout_seconds") < 60
    assert arguments.pop("cluster_detection_method", None) == ("deactivate" if named else None)
    assert arguments == named


def test_open_mpi_versions_unknown_to_jax(environment):
    environment({"OMPI_COMM_WORLD_SIZE": "2"})
    with (
        pytest.raises(OSError, match="cannot connect to the processes of Open MPI: .* Set JAX_COORD"),
        distributed.distributed_session("demo"),
    ):
        pass


@pytest.mark.parametrize(
    "variables, message",
    [
        (
            BY_HAND | {"JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES is 'two': must be an integer of at least 0",
        ),
        (BY_HAND | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES is 0: must be above 0"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2: must be below JAX_NUM_PROCESSES, 2"),
        (BY_HAND | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1': must be an integer of at least 0"),
        (BY_HAND | {"JAX_PROCESS_ID": None}, "JAX_PROCESS_ID is None: must be set together with the others"),
        (
            BY_HAND | {"JAX_NUM_PROCESSES": None},
            "JAX_NUM_PROCESSES is None: must be set together with the others",
        ),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS is None: must be HOST:PORT"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS is 'here': must be HOST"),
        ({"JAX_COORDINATOR_ADDRESS": "here:1"}, "JAX_COORDINATOR_ADDRESS is 'here:1': requires JAX_NUM"),
    ],
)
def test_an_invalid_environment(environment, variables, message):
    environment(variables)
    with pytest.raises(ValueError, match=message) as error, distributed.distributed_session("demo"):
        pass
    assert "\n" not in str(error.value)
