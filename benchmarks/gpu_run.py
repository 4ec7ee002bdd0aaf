"""Shared by the sections of gpu.py: time limits, failures, comparisons, and the limits of the GPU."""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from common import alternate, spread, timed

REPETITIONS = 5
# Calls are queued to take this long together, so that the overhead of the host does not count.
QUEUE_SECONDS = 0.02


class Run:
    """One run of the script: settings, remaining time, failures."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self._end = math.inf

    def start_clock(self, seconds: float) -> None:
        """Starts the time limit of the next section."""
        self._end = time.monotonic() + seconds

    @property
    def time_left(self) -> float:
        return self._end - time.monotonic()

    def attempt(self, name: str, function: Callable, *args):
        """Returns the function's result, or None if it fails, which is recorded."""
        try:
            return function(*args)
        except Exception as error:  # The other figures still matter.
            words = " ".join(str(error).split())
            self.failures.append(f"{name}: {type(error).__name__}: {words[:300]}")
            print(f"failed: {self.failures[-1]}", flush=True)
            return None

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
        print(f"skipped: {self.skipped[-1]}", flush=True)

    def compare(self, name: str, functions: dict[str, Callable]) -> dict[str, dict[str, float]]:
        """Returns the spread of seconds of one call of each function; the functions alternate.

        A function that fails or for which no time is left is missing in the result.
        """
        queues, calls = {}, {}
        for form, function in functions.items():
            if self.time_left <= 0:
                self.skip(f"{name}, {form}", "no time left")
                continue
            seconds = self.attempt(f"{name}, {form}", functools.partial(timed, function, repetitions=2))
            if seconds is None:
                continue
            once = min(seconds)
            if once * (REPETITIONS + 1) > self.time_left:
                self.skip(f"{name}, {form}", f"no time left; one call takes {once:.2f} s")
                continue
            calls[form] = max(1, min(50, round(QUEUE_SECONDS / once)))
            queues[form] = functools.partial(_queue, function, calls[form])
        seconds = self.attempt(name, functools.partial(alternate, queues, REPETITIONS)) or {}
        return {form: spread([s / calls[form] for s in values]) for form, values in seconds.items()}

    @functools.cached_property
    def peaks(self) -> dict[str, dict[str, float]]:
        """The bfloat16 FLOP/s and bytes/s of this GPU at best, as spreads."""
        size, length = (64, 1 << 12) if self.smoke else (16384, 1 << 31)
        a, b = (jnp.ones((size, size), jnp.bfloat16) for _ in range(2))
        matmul = timed(jax.jit(jnp.matmul), a, b, repetitions=2 * REPETITIONS)
        x = jnp.ones(length, jnp.float32)
        # Reads and writes each element once.
        copy = timed(jax.jit(lambda x: x + 1), x, repetitions=2 * REPETITIONS)
        return {
            "matmul_flops": spread([2 * size**3 / seconds for seconds in matmul]),
            "bandwidth": spread([2 * x.nbytes / seconds for seconds in copy]),
        }

    @property
    def peak(self) -> float:
        return self.peaks["matmul_flops"]["max"]

    @property
    def bandwidth(self) -> float:
        return self.peaks["bandwidth"]["max"]


def _queue(function, calls):
    for _ in range(calls):
        last = function()
    return last
