"""What the sections of gpu.py share: the clock, what failed, comparisons, and the GPU's own limits."""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from common import alternate, spread, timed

REPETITIONS = 5
# Calls are queued until so many seconds are full: the host's part in one call would be seen otherwise.
QUEUE_SECONDS = 0.02


class Run:
    """One run of the script: its settings, its clock and what it has found so far."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self._end = math.inf

    def give(self, seconds: float) -> None:
        """The time that the next section has."""
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def attempt(self, name: str, function: Callable, *args):
        """The function's result; where it fails, None, and the run goes on but counts as failed."""
        try:
            return function(*args)
        except Exception as error:  # Whatever it is, the other figures are wanted.
            words = " ".join(str(error).split())
            self.failures.append(f"{name}: {type(error).__name__}: {words[:300]}")
            print(f"failed: {self.failures[-1]}", flush=True)
            return None

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
        print(f"skipped: {self.skipped[-1]}", flush=True)

    def compare(self, name: str, functions: dict[str, Callable]) -> dict[str, dict[str, float]]:
        """Seconds of one call of each function as a spread; the calls take turns.

        A function that fails, or that there is no time for, is left out of the result.
        """
        queues, calls = {}, {}
        for form, function in functions.items():
            if self.left <= 0:
                self.skip(f"{name}, {form}", "no time left")
                continue
            seconds = self.attempt(f"{name}, {form}", functools.partial(timed, function, repetitions=2))
            if seconds is None:
                continue
            once = min(seconds)
            if once * (REPETITIONS + 1) > self.left:
                self.skip(f"{name}, {form}", f"no time left; one call takes {once:.2f} s")
                continue
            calls[form] = max(1, min(50, round(QUEUE_SECONDS / once)))
            queues[form] = functools.partial(_queue, function, calls[form])
        seconds = self.attempt(name, functools.partial(alternate, queues, REPETITIONS)) or {}
        return {form: spread([s / calls[form] for s in values]) for form, values in seconds.items()}

    @functools.cached_property
    def peaks(self) -> dict[str, dict[str, float]]:
        """What this GPU reaches in its best cases: bfloat16 FLOP/s and bytes/s, each as a spread."""
        size, length = (64, 1 << 12) if self.smoke else (16384, 1 << 31)
        a, b = (jnp.ones((size, size), jnp.bfloat16) for _ in range(2))
        product = timed(jax.jit(jnp.matmul), a, b, repetitions=2 * REPETITIONS)
        x = jnp.ones(length, jnp.float32)
        # Reads and writes each number once.
        copy = timed(jax.jit(lambda x: x + 1), x, repetitions=2 * REPETITIONS)
        return {
            "matmul_flops": spread([2 * size**3 / seconds for seconds in product]),
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
