"""The run: batch, step, log, evaluate, save."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoints.run import Checkpoints
from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_path
from gptoss_jax.data.batches import held_out_batches, local_rows, make_global_batch, train_batches
from gptoss_jax.data.token_cache import TokenCache
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.in_flight import bounded
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.parallel.rules import batch_sharding
from gptoss_jax.training import resume, setup
from gptoss_jax.training.console import Console
from gptoss_jax.training.logging import RunLog
from gptoss_jax.training.losses import bits_per_byte
from gptoss_jax.training.state import TrainState
from gptoss_jax.training.step import make_eval_step, make_train_step


def train(config: TrainConfig) -> TrainState:
    """Trains a model, or resumes the run of the same folder and config; `train.py` calls it.

    Returns the final state. Ctrl-C and SIGTERM save first, then raise KeyboardInterrupt and SystemExit(143).

    Raises:
      ValueError: a setting, the text or the run folder does not fit; the message names it.
      FloatingPointError: loss or gradient was not finite in 20 steps in a row.
      OSError: something could not be written; checkpoints written before stay.
    """
    config = dataclasses.replace(config, run_dir=str(user_path(config.run_dir, "run_dir")))
    is_main = jax.process_index() == 0
    console = Console(quiet=not is_main)
    mesh = make_mesh(config.mesh)
    _check(config, mesh, console)
    cache = setup.open_cache(config.data, console.message)
    setup.check_text(config, cache)
    sharding = batch_sharding(mesh)
    batches = train_batches(cache, config.data, config.seed, local_rows(sharding, config.data.batch_size))
    run_dir = pathlib.Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        if is_main:
            stack.enter_context(setup.only_run_in(run_dir))
        setup.check_shared(run_dir)
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(run_dir, config.checkpoint.keep, eval_batches=config.eval.batches)
        stack.callback(checkpoints.close)
        state, record = setup.first_state(config, mesh, checkpoints, cache, console.message)
        if record is not None:
            batches.set_state(record["data"])
        if is_main:
            setup.write_folder(config, cache.tokenizer, is_new=record is None)
        step = first_step = int(state.step)
        tokens_seen, jumped = (record["tokens_seen"], record["schedule_jumped"]) if record else (0, False)
        log = RunLog(config, cache, console, first_step, tokens_seen, checkpoints.best_loss)
        stack.callback(log.close)
        train_step, eval_step = make_train_step(config), make_eval_step(config.model)
        stop = stack.enter_context(Interruption(console.message))
        log.greet(mesh, first_step)
        pending = None
        while True:
            last, stopping = step == config.steps, stop.asked(step)
            evaluate = step > first_step and (last or step % config.eval.every == 0)
            due = evaluate or stopping or step % config.checkpoint.every == 0
            save = step > first_step and due
            if pending is not None and save:
                log.step(*pending)
                pending = None
            with log.clock.other_work():
                val_loss = None
                if evaluate:
                    held_out = functools.partial(_held_out_loss, config, cache, eval_step, state)
                    val_loss, bits = held_out(config.eval.batches)
                    log.evaluation(step, val_loss, bits)
                if last and evaluate:
                    log.evaluation(step, *held_out(None), final=True)
                if save:
                    position = batches.get_state()
                    record = setup.checkpoint_record(cache, config, position, log.tokens_seen, jumped)
                    checkpoints.save(step, *setup.split_state(state), record, val_loss)
                if evaluate:
                    log.sample(step, state.params)
            if last or stopping:
                break
            with log.clock.waiting_for_data():
                batch = make_global_batch(next(batches), sharding, config.data.batch_size)
            state, metrics = train_step(state, batch)
            step += 1
            # A step is logged while the next one runs on the device. This also bounds the steps in flight to
            # two, because logging waits for the metrics of every step, whatever log_every is.
            if pending is not None:
                log.step(*pending)
            pending = (step, metrics)
        checkpoints.wait()
        log.finish(step, first_step)
    if step < config.steps:
        stop.leave()
    return state


def _check(config: TrainConfig, mesh: jax.sharding.Mesh, console: Console) -> None:
    """Raises ValueError for a run that cannot be started, before any text is tokenized."""
    setup.check_same_config(config)
    setup.check_devices(config, mesh)
    distributed.agree_on_kernels(config.model.kernels)
    resume.check_folder(config)
    setup.check_init_from(config, console.message)


def _held_out_loss(
    config: TrainConfig, cache: TokenCache, eval_step: Callable, state: TrainState, limit: int | None
) -> tuple[float, float]:
    """Mean -log p of held-out tokens in nats, and bits per byte of their text."""
    sharding = batch_sharding(jax.tree.leaves(state.params)[0].sharding.mesh)
    batch_size = config.data.batch_size
    sums = bounded(
        eval_step(state.params, make_global_batch(batch, sharding, batch_size))
        for batch in held_out_batches(cache, config.data, limit, local_rows(sharding, batch_size))
    )
    nats, tokens = np.sum([np.asarray(jax.device_get(pair), np.float64) for pair in sums], axis=0)
    loss = float(nats / tokens)
    # A part of the text stands for the whole by its loss per token: bytes are known of whole documents only.
    targets = cache.meta["held_out_tokens"] - cache.meta["held_out_documents"]
    return loss, bits_per_byte(loss * targets, cache.meta["held_out_bytes"])


class Interruption:
    """Ctrl-C and SIGTERM ask the loop to save and leave; a second Ctrl-C does not wait."""

    def __init__(self, report: Callable[[str], None]):
        self._report, self._signal, self._before = report, None, {}

    def __enter__(self) -> "Interruption":
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            # JAX handles SIGTERM of several processes.
            for number in (signal.SIGINT, signal.SIGTERM)[: 1 if jax.process_count() > 1 else 2]:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self._signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Nothing is printed here: the signal may have come in the middle of a print.
        self._signal = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Returns True if the run stops before this step: the same answer in all processes."""
        several = jax.process_count() > 1
        asked = distributed.stop_requested(step) if several else self._signal is not None
        if asked:
            self._report("Stopping: the run is saved first. Ctrl-C leaves at once.")
        return asked

    def leave(self) -> None:
        """Ends the program the way the signal asked for."""
        if jax.process_count() == 1 and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self._signal or signal.SIGTERM))
