"""Workers: peers in separate processes that are measured alternately, one working while the others wait.

A worker runs this file with the names of a module and a function. The function takes the settings, prepares,
and returns a dict of commands: functions without arguments, by name. `Worker.ask(name)` runs one in the
worker and returns its result, as JSON.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys

from gptoss_jax import startup

HERE = pathlib.Path(__file__).parent
# The settings that train.py restarts itself with; the peers get them too.
MEMORY = ":".join(startup.TUNABLES)


class Worker:
    """A process that runs `module.function(**settings)` and then its commands."""

    def __init__(self, module: str, function: str, settings: dict, **environment: str):
        environment = os.environ | {"GLIBC_TUNABLES": MEMORY, "JAX_PLATFORMS": "cpu"} | environment
        command = [sys.executable, __file__, module, function, json.dumps(settings)]
        self._process = subprocess.Popen(
            command, env=environment, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._answer()

    def ask(self, name: str):
        self._process.stdin.write(f"{name}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"{' '.join(self._process.args[2:])} exited with {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def main(module: str, function: str, settings: str) -> None:
    sys.path.insert(0, str(HERE))
    commands = getattr(importlib.import_module(module), function)(**json.loads(settings))
    print("answer null", flush=True)
    for line in sys.stdin:
        print("answer", json.dumps(commands[line.strip()]()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
