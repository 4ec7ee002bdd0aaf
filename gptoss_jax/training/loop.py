"""The training loop: evaluate, save, step, log."""

import contextlib
import dataclasses
import os
import pathlib
import signal
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gptoss_jax import host_memory, interrupts
from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_path
from gptoss_jax.data.batches import held_out_batches, local_rows, make_global_batch
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.model.fake_quant import exported_config, exported_params
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import IsTrainable, merge_params
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.in_flight import bounded
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training import resume, setup
from gptoss_jax.training.console import Console
from gptoss_jax.training.feeds import Feed, TextFeed
from gptoss_jax.training.logging import RunLog
from gptoss_jax.training.objectives import Objective
from gptoss_jax.training.profile import StepTracer
from gptoss_jax.training.reference import with_reference
from gptoss_jax.training.rewards import Reward, load_rewards
from gptoss_jax.training.rl import make_objective
from gptoss_jax.training.rollouts import RolloutFeed
from gptoss_jax.training.state import TrainState
from gptoss_jax.training.step import make_eval_step, make_train_step

# Printed if the current step takes long.
PATIENCE = "saving and stopping after this step; press Ctrl-C again to stop at once, without saving"
# Evaluations: on `eval.batches` batches, and on all held-out text.
SHORT, FULL = "short", "full"
# (params, is_full) -> mean metrics, None if a signal stopped it.
Measure = Callable[[dict, bool], dict[str, float] | None]
UNSAVED = "the steps since the last checkpoint are lost; to resume from it, run the same command again"


def train(
    config: TrainConfig, objective: Objective | None = None, is_trainable: IsTrainable | None = None
) -> TrainState:
    """Trains a model, or resumes the run with the same folder and config; called by `gptoss train`.

    Returns the final state. Ctrl-C and SIGTERM save first, then raise KeyboardInterrupt and SystemExit(143).

    Args:
      objective: the loss to minimize and the metrics to evaluate; None is the one that the config names.
      is_trainable: selects the parameters to train by their paths; None trains only the adapters if
        `model.lora` is set, otherwise all. The others are frozen, without optimizer state. A resumed run must
        select the same parameters.

    Raises:
      ValueError: a setting, the text or the run folder is invalid; the message names it.
      FloatingPointError: loss or gradient was not finite for 20 consecutive steps.
      OSError: a file could not be written; earlier checkpoints are kept.
    """
    config = dataclasses.replace(config, run_dir=str(user_path(config.run_dir, "run_dir")))
    is_trainable = is_trainable or (None if config.model.lora is None else is_adapter)
    objective = make_objective(config) if objective is None else objective
    is_main = jax.process_index() == 0
    console = Console(quiet=not is_main)
    mesh = make_mesh(config.mesh)
    setup.check_settings(config, mesh, console.message)
    rewards = load_rewards(config.grpo) if config.objective == "grpo" else []
    cache = setup.open_cache(config, console.message)
    feed = _open_feed(config, cache, mesh, console, rewards)
    run_dir = pathlib.Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(setup.lock_run_dir(run_dir))
        setup.check_shared(run_dir)
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(run_dir, config.checkpoint.keep, eval_batches=config.eval.batches)
        stack.callback(checkpoints.close)
        state, frozen, metadata = resume.init_or_restore_state(
            config, mesh, checkpoints, cache, console.message, is_trainable
        )
        cache, feed = _prepare_data(config, cache, feed, (state, frozen), metadata, console)
        setup.write_run_dir(config, cache, is_new=metadata["data"] is None)
        step = first_step = int(state.step)
        log = RunLog(config, cache, console, first_step, metadata["tokens_seen"], checkpoints.best_loss)
        stack.callback(log.close)
        tracer = StepTracer(config, make_train_step(config, objective), first_step, console.message)
        train_step = _release_memory(stack.enter_context(tracer))
        stop = stack.enter_context(StopSignal(console.message, first_step))
        evaluate = _evaluation(_measure(config, cache, objective, log, stop, feed), log)
        log.log_header(mesh, first_step, merge_params(state.params, frozen))
        while True:
            is_last, stopping, val_loss = step == config.steps, stop.requested(step), None
            pending = _pending_evaluations(step, config, metadata if step == first_step else None)
            is_eval = bool(pending)
            is_save = step > first_step and (is_eval or stopping or step % config.checkpoint.every == 0)
            if is_save:
                log.flush()
            with log.timer.measure("other"), host_memory.released(is_eval or is_save):
                if is_eval:
                    params = merge_params(state.params, frozen)
                    val_loss, pending = evaluate(step, params, pending)
                if is_save:
                    position = {"data": feed.get_state(step), "tokens_seen": log.tokens_seen}
                    metadata = metadata | position | {"pending": pending}
                    with console.status("saving a checkpoint"):
                        checkpoints.save(step, *resume.checkpoint_items(state, frozen, metadata), val_loss)
                if is_eval and not stop.is_set:
                    feed.show(step, params, log)
            if is_last or stopping or (is_save and stop.is_set):
                break
            batch, sampled = feed.next(step, state.params, frozen, log)
            state, metrics = train_step(state, batch, frozen)
            step += 1
            log.step(step, metrics | sampled)
        checkpoints.wait()
        log.finish(step, first_step, is_done=is_last and not pending)
    if not is_last or pending:
        stop.leave()
    return dataclasses.replace(state, params=merge_params(state.params, frozen))


def _open_feed(
    config: TrainConfig,
    cache: TokenCache,
    mesh: jax.sharding.Mesh,
    console: Console,
    rewards: Sequence[Reward] = (),
) -> Feed:
    """Returns the batches of this process; `rewards` are those of `config.grpo`."""
    if config.objective == "grpo":
        return RolloutFeed(config, cache, mesh, console.message, rewards)
    return TextFeed(config, cache, mesh)


def _prepare_data(
    config: TrainConfig,
    cache: TokenCache,
    feed: Feed,
    params: tuple[TrainState, dict],
    metadata: dict[str, Any],
    console: Console,
) -> tuple[TokenCache, Feed]:
    """Returns the cache and the batches of a run from its position on, with the log-probabilities of the
    reference model if it needs them; `params` are the state and the frozen parameters."""
    compared = with_reference(config, cache, *params, metadata, console.message)
    if compared is not cache:
        feed = _open_feed(config, compared, jax.sharding.get_mesh(), console)
    if metadata["data"] is not None:
        feed.set_state(metadata["data"])
    return compared, feed


def _release_memory(train_step: Callable) -> Callable:
    """Returns `train_step` that releases what compiling needed, and then what steps leave (`host_memory`)."""
    growth, number = host_memory.Growth(), 0

    def step(*arguments):
        nonlocal number
        state, metrics = train_step(*arguments)
        number += 1
        if number <= 2:
            # The first step has compiled; the second one tells what a step needs.
            metrics["loss"].block_until_ready()
        if number == 1:
            host_memory.release()
        else:
            growth.check()
        return state, metrics

    return step


def _pending_evaluations(step: int, config: TrainConfig, metadata: dict[str, Any] | None) -> list[str]:
    """Returns the evaluations to run at a step; if the run starts or resumes there, with `metadata`, those
    that a signal stopped."""
    evaluations = [SHORT, FULL] if step == config.steps else [SHORT] if step % config.eval.every == 0 else []
    stopped = evaluations if metadata is None else metadata.get("pending", [])
    return [kind for kind in evaluations if kind in stopped]


def _measure(
    config: TrainConfig, cache: TokenCache, objective: Objective, log: RunLog, stop: "StopSignal", feed: Feed
) -> Measure:
    """Returns the function that measures a model on held-out data."""
    if isinstance(feed, RolloutFeed):

        def measure(params: dict, is_full: bool) -> dict[str, float] | None:
            with log.console.status("evaluating"):
                return feed.measure(params, is_full, lambda: stop.is_set)

        return measure
    # Weights are rounded once, not in every batch.
    eval_step = make_eval_step(exported_config(config.model), objective)

    def mean_metrics(params: dict, is_full: bool) -> dict[str, float] | None:
        sharding = batch_sharding(jax.tree.leaves(params)[0].sharding.mesh)
        params, batch_size = exported_params(config.model, params), config.data.batch_size
        num_batches, results = None if is_full else config.eval.batches, []
        batches = held_out_batches(cache, config.data, num_batches, local_rows(sharding, batch_size))
        dispatched = (eval_step(params, make_global_batch(batch, sharding, batch_size)) for batch in batches)
        with log.console.status("evaluating"):
            for result in bounded(dispatched):
                if stop.is_set:
                    return None
                results.append(jax.device_get(result))
        sums, weight = jax.tree.map(lambda *values: np.sum(values, dtype=np.float64), *results)
        return {name: float(total / weight) for name, total in sums.items()}

    return mean_metrics


def _evaluation(
    measure: Measure, log: RunLog
) -> Callable[[int, dict, list[str]], tuple[float | None, list[str]]]:
    """Returns a function (step, params, evaluations) -> loss of the short one, if any, and the evaluations
    that are left because a signal stopped them."""

    def evaluate(step: int, params: dict, evaluations: list[str]) -> tuple[float | None, list[str]]:
        val_loss = None
        for index, kind in enumerate(evaluations):
            means = measure(params, kind == FULL)
            if means is None:
                return val_loss, evaluations[index:]
            loss = log.evaluation(step, means, is_final=kind == FULL)
            val_loss = loss if kind == SHORT else val_loss
        return val_loss, []

    return evaluate


class StopSignal:
    """Tells the loop to save and stop on Ctrl-C and SIGTERM; a second Ctrl-C stops immediately.

    With a single process, only from the end of the first step on: until then, there is nothing to save, and
    compilation would make the user wait.
    """

    def __init__(self, report: Callable[[str], None], first_step: int):
        self._report, self._first_step = report, first_step
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._stack = contextlib.ExitStack()
        self._is_single, self._is_active = jax.process_count() == 1, False

    def __enter__(self) -> "StopSignal":
        if not self._is_single:
            self._activate()
        return self

    def _activate(self) -> None:
        self._is_active = True
        self._stack.enter_context(interrupts.patient(PATIENCE))
        self._stack.enter_context(interrupts.explain(UNSAVED))
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            # With several processes, JAX handles SIGTERM.
            for number in (signal.SIGINT, signal.SIGTERM) if self._is_single else (signal.SIGINT,):
                self._handlers[number] = signal.signal(number, self._handle)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._stack.close()

    def _handle(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            interrupts.leave_now(number)
        # Nothing is printed here: the signal may have interrupted a print.
        self._signal = number
        if not self._is_single:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def is_set(self) -> bool:
        """True after a signal, unless several processes must agree first."""
        return self._is_single and self._signal is not None

    def requested(self, step: int) -> bool:
        """Returns True, in all processes, if the loop must stop before this step."""
        if step > self._first_step and not self._is_active:
            self._activate()
        requested = self.is_set if self._is_single else distributed.stop_requested(step)
        if requested:
            interrupts.acknowledge()
            self._report("Stopping after saving the run. Press Ctrl-C again to stop at once.")
        return requested

    def leave(self) -> None:
        """Raises the exception that corresponds to the signal."""
        if self._is_single and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self._signal or signal.SIGTERM))
