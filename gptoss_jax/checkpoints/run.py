"""Checkpoints of a run (Orbax): any trees of arrays and a JSON record, written in the background, sharded.

A checkpoint holds the items `params` (the model's tree), `training` (everything else a step changes) and
`record` (data position, config, tokenizer: what `train.py` needs to resume). It appears under its final name
only when it is complete.
"""

import json
import logging
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gptoss_jax.checkpoints.orbax_support import LocalPath, Manager, check_folder_name, first_line
from gptoss_jax.config import TrainConfig
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel import distributed
from gptoss_jax.parallel.rules import dtype_bytes

OVERHEAD = 2 << 20  # bytes of a checkpoint besides its arrays: indices, the record, half-filled blocks


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        run_dir: str | pathlib.Path,
        keep: int = 2,
        read_only: bool = False,
        eval_batches: int | None = None,
    ):
        """Keeps the `keep` latest checkpoints and the one with the lowest finite validation loss.

        Losses that the run measured on another number of batches than `eval_batches` are ignored, unless it
        is None.
        """
        self.folder = pathlib.Path(run_dir).absolute() / "checkpoints"
        check_folder_name(self.folder, "run_dir", str(run_dir))
        self._verified, self._eval_batches = False, eval_batches
        # Orbax reports each routine step of a save as a warning or worse; what matters comes back as an
        # exception.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        best = BestN(get_metric_fn=_goodness, n=1, keep_checkpoints_without_metrics=False)
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_goodness,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "training": ocp.StandardCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        }
        folder = LocalPath(self.folder)
        return Manager(self._eval_batches, folder, options=self._options, item_handlers=handlers)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, in rising order."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None when no checkpoint has a finite one."""
        return None if self.best_loss == math.inf else self._manager.best_step()

    @property
    def best_loss(self) -> float:
        """The lowest finite validation loss of the checkpoints on disk; infinity when none has one."""
        step = self._manager.best_step()
        metrics = None if step is None else self._manager.metrics(step)
        return math.inf if metrics is None else -_goodness(metrics)

    def save(
        self, step: int, params: Any, training: Any, record: dict[str, Any], val_loss: float | None = None
    ) -> None:
        """Copies the trees out of the devices and returns; the rest happens in the background.

        The first save of this object waits until the checkpoint is on disk and checks that it can be read:
        a folder in which no checkpoint can be read must not cost more than the steps up to the first one.
        `val_loss` counts only when it is finite.

        Raises OSError when this or an earlier checkpoint could not be written; those before it stay.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            record=ocp.args.JsonSave(record),
        )
        has_loss = val_loss is not None and math.isfinite(val_loss)
        metrics = {"val_loss": val_loss} if has_loss else None
        if jax.process_index() == 0:  # all write to the same disk
            self._check_room(step, dtype_bytes((params, training)) + OVERHEAD)
        self._guarded(step, lambda: self._manager.save(step, args=items, metrics=metrics, force=True))
        if not self._verified:
            self.wait()
            self._verify(step, {"params": params, "training": training})
            self._verified = True

    def _verify(self, step: int, trees: dict[str, Any]) -> None:
        """Raises OSError when the checkpoint of a step is not complete, and sets it aside. Reads the metadata
        of its arrays, not their values."""
        reason = None
        if jax.process_index() == 0:
            try:
                found = self._manager.item_metadata(step)
                for name, tree in trees.items():
                    have, expected = len(jax.tree.leaves(found[name].tree)), len(jax.tree.leaves(tree))
                    if have != expected:
                        reason = f"{name} has {have} arrays of {expected}"
                json.loads((self.folder / str(step) / "record" / "metadata").read_bytes())
            except Exception as error:  # Orbax, TensorStore and JSON each have their own
                reason = first_line(error)
        reason = distributed.exchange(reason)[0]
        if reason is not None:
            self._set_aside([step])
            raise OSError(
                f"{self.folder}: the checkpoint of step {step} was written but is not complete: {reason}"
            )

    def _check_room(self, step: int, needed: int) -> None:
        """Raises OSError before anything is written when the disk cannot take the checkpoint."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder}: the checkpoint of step {step} could not be written: it needs "
                f"{needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left; {self._last()}"
            )

    def _last(self) -> str:
        return f"the last whole one is of step {self.steps[-1]}" if self.steps else "there is none yet"

    def wait(self) -> None:
        """Returns when everything is on disk. Raises OSError when something could not be written."""
        self._guarded(None, self._manager.wait_until_finished)

    def _guarded(self, step: int | None, action: Callable[[], Any]) -> None:
        # What a full disk raises depends on the layer that met it, and on the thread.
        try:
            action()
        except Exception as error:
            which = "a checkpoint" if step is None else f"the checkpoint of step {step} (or the one before)"
            raise OSError(
                f"{self.folder}: {which} could not be written: {first_line(error)}; {self._last()}"
            ) from error

    def restore(
        self, params: Any, training: Any, report: Callable[[str], None] = print
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """The latest checkpoint that can be read, each array placed as its abstract counterpart says.

        A damaged one is said through `report` and moved to `damaged-STEP` beside it, so that the one before
        is used and nothing is lost. Returns (step, params, training, record), or None where there is no
        checkpoint. Raises ValueError when there are checkpoints and none can be read.
        """
        steps, damaged = self.steps, []
        items = {
            "params": ocp.args.StandardRestore(params),
            "training": ocp.args.StandardRestore(training),
            "record": ocp.args.JsonRestore(),
        }
        for step in reversed(steps):
            reason = cause = None
            try:
                restored = self._read(step, items)
            except ValueError as error:
                reason, cause = str(error), error
            # What one process cannot read is damaged for all.
            reason = next((said for said in distributed.exchange(reason) if said is not None), None)
            if reason is not None:
                damaged.append(step)
                if step == steps[0]:
                    raise ValueError(
                        f"{self.folder}: no checkpoint can be read; that of step {step}: {reason}"
                    ) from cause
                report(f"checkpoint of step {step} is damaged ({reason}); using the one before")
                continue
            self._set_aside(damaged)
            return step, restored["params"], restored["training"], restored["record"]
        return None

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        self._manager.close()
        if jax.process_index() == 0:
            for step in steps:
                target = self.folder / f"damaged-{step}"
                for count in range(1, 1000):
                    if not target.exists():
                        break
                    target = self.folder / f"damaged-{step}-{count}"
                (self.folder / str(step)).rename(target)
        distributed.exchange(None)
        self._manager = self._open()

    def restore_params(self, step: int, params: Any) -> Any:
        """The model's tree of one checkpoint alone. Raises ValueError when it cannot be read."""
        try:
            return self._read(step, {"params": ocp.args.StandardRestore(params)})["params"]
        except ValueError as error:
            others = ", ".join(str(other) for other in self.steps if other != step)
            hint = f"running train.py again sets it aside and uses another ({others})"
            hint = hint if others else "there is no other one"
            raise ValueError(f"{self.folder}/{step}: cannot be read ({error}); {hint}") from error

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        """Items of one checkpoint. Raises ValueError, naming the item, when one is missing or damaged."""
        found = {}
        for name, arguments in items.items():
            try:
                one = self._manager.restore(step, args=ocp.args.Composite(**{name: arguments}))
            except Exception as error:  # Orbax, TensorStore and JSON each have their own for a broken file
                raise ValueError(f"{name}: {first_line(error)}") from error
            found[name] = one.get(name)
            if not isinstance(found[name], dict):
                raise ValueError(f"{name}: must be a {'JSON object' if name == 'record' else 'tree'}")
        return found

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder."""
        self._guarded(None, self._manager.close)


def _goodness(metrics: dict[str, float]) -> float:
    """Higher is better. A loss that is not finite, as older runs have stored, is worse than any other."""
    loss = metrics["val_loss"]
    return -loss if math.isfinite(loss) else -math.inf


def is_run(folder: str | pathlib.Path) -> bool:
    """Whether a folder is a run of train.py: its config.json is a `TrainConfig`'s."""
    try:
        values = json.loads((pathlib.Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"model", "data", "optim"} <= values.keys()


def load_config(folder: str | pathlib.Path) -> TrainConfig:
    """The config of a run folder of train.py. Raises ValueError when the folder is none."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a run folder of train.py (it holds no config.json)")
    return TrainConfig.load(folder / "config.json")


def load_run(
    folder: str | pathlib.Path,
    step: int | None = None,
    abstract: dict | None = None,
    device: jax.Device | None = None,
) -> tuple[TrainConfig, dict, Tokenizer]:
    """Config, parameters and tokenizer of a run folder of train.py.

    Args:
      step: which checkpoint; None takes the one with the lowest validation loss, or else the latest.
      abstract: the parameter tree with the shardings to load it with; None puts all on one device.
      device: which one; None is the first.

    Raises ValueError when the folder is no run, or has no such checkpoint.
    """
    config = load_config(folder)
    if not (pathlib.Path(folder) / "checkpoints").is_dir():
        raise ValueError(f"{folder}: holds no checkpoint yet")
    if abstract is None:
        here = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            abstract_params(config.model),
        )
    checkpoints = Checkpoints(folder, read_only=True, eval_batches=config.eval.batches)
    try:
        known, best = checkpoints.steps, checkpoints.best_step
        if not known:
            raise ValueError(f"{folder}: holds no checkpoint yet")
        if step is None:
            step = known[-1] if best is None else best
        if step not in known:
            raise ValueError(
                f"{folder}: has no checkpoint of step {step}; there are {', '.join(map(str, known))}"
            )
        return config, checkpoints.restore_params(step, abstract), load_tokenizer(folder)
    finally:
        checkpoints.close()
