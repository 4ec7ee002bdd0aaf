"""Profiler traces of training steps in the xplane format, which TensorBoard and xprof read."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gptoss_jax.config import TrainConfig


class StepTracer:
    """Calls the compiled training step, and traces the calls that `config.profile` names.

    Steps count from 1. The first call of a process, which compiles the step, is never traced: a run that
    resumes within these steps traces the rest of them. Each process writes one trace, to `profile` in the run
    folder, with several processes to a folder of its own there. Leaving the context ends a trace that is
    running, as when the run is stopped.
    """

    def __init__(
        self, config: TrainConfig, step: Callable[..., Any], first_step: int, report: Callable[[str], None]
    ):
        """`first_step` is the number of steps that the run has already taken."""
        self._call, self._number, self._report = step, first_step, report
        steps = config.profiled_steps()
        self._steps = range(max(steps.start, first_step + 2), steps.stop)
        self._folder = pathlib.Path(config.run_dir, "profile")
        if jax.process_count() > 1:
            self._folder /= f"process_{jax.process_index()}"
        self._is_tracing = False

    def __enter__(self) -> "StepTracer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def __call__(self, state: Any, *arguments: Any) -> tuple[Any, Any]:
        """Takes a step, and returns its new state and metrics."""
        self._number += 1
        if self._number not in self._steps:
            return self._call(state, *arguments)
        if not self._is_tracing:
            # The steps before this one may still be running.
            jax.block_until_ready(state)
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=self._number):
            result = self._call(state, *arguments)
        if self._number == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # Python's calls would slow down the steps and fill the trace.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._is_tracing = True

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            traced = f"steps {self._steps[0]} to {min(self._number, self._steps[-1])}"
            self._report(f"Profile of {traced}: tensorboard --logdir {self._folder}")
