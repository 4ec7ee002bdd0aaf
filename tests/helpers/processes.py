"""Real processes on this machine, connected by Gloo."""

import os
import pathlib
import socket
import subprocess

from helpers.xla_flags import FAST_COMPILE

ROOT = pathlib.Path(__file__).parents[2]


def start_one(command, devices=1, **variables):
    flags = f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        command, env=environment | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def start_all(command, devices=1, count=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [start_one(command, devices, **common, JAX_PROCESS_ID=str(index)) for index in range(count)]


def wait_for_exit(started, timeout=200):
    """Returns (exit code, stdout, stderr) of each process."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]
