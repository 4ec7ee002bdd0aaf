"""Checkpoints of a run (Orbax): any trees of arrays and a JSON record, written in the background, sharded.

A checkpoint holds the items `params` (the model's tree), `training` (everything else a step changes) and
`record` (data position, config, tokenizer: what `train.py` needs to go on). It appears under its final name
only when it is whole.
"""

import json
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import require_utf8
from gptoss_jax.data.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel import processes
from gptoss_jax.parallel.sharding import dtype_bytes

ITEMS = ("params", "training", "record")
OVERHEAD = 2 << 20  # bytes of a checkpoint besides its arrays: indices, the record, half-filled blocks


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_dir: str | pathlib.Path, keep: int = 2, read_only: bool = False):
        """Keeps the `keep` latest checkpoints and the one with the lowest validation loss."""
        self.folder = pathlib.Path(run_dir).absolute() / "checkpoints"
        require_utf8(self.folder.parent, "run_dir")
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
        return ocp.CheckpointManager(self.folder, options=self._options, item_names=ITEMS)

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, in rising order."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None when no checkpoint carries one."""
        return self._manager.best_step()

    def save(
        self, step: int, params: Any, training: Any, record: dict[str, Any], val_loss: float | None = None
    ) -> None:
        """Copies the trees out of the devices and returns; the rest happens in the background.

        Raises OSError when this or an earlier checkpoint could not be written; those before it stay.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            record=ocp.args.JsonSave(record),
        )
        metrics = None if val_loss is None else {"val_loss": val_loss}
        if jax.process_index() == 0:  # all write to the same disk
            self._check_room(step, dtype_bytes((params, training)) + OVERHEAD)
        self._guarded(step, lambda: self._manager.save(step, args=items, metrics=metrics, force=True))

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
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OSError(f"{self.folder}: {which} could not be written: {reason}; {self._last()}") from error

    def restore(
        self, params: Any, training: Any, report: Callable[[str], None] = print
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """The latest checkpoint that can be read, each array placed as its abstract counterpart says.

        A damaged one is said through `report` and moved to `damaged-STEP` beside it, so that the one before
        is used and nothing is lost. Returns (step, params, training, record), or None where there is no
        checkpoint. Raises ValueError when there are checkpoints and none can be read.
        """
        steps, damaged = self.steps, []
        for step in reversed(steps):
            items = ocp.args.Composite(
                params=ocp.args.StandardRestore(params),
                training=ocp.args.StandardRestore(training),
                record=ocp.args.JsonRestore(),
            )
            reason = cause = None
            try:
                restored = self._manager.restore(step, args=items)
            except Exception as error:  # Orbax, tensorstore and JSON each have their own for a broken file
                reason, cause = str(error).strip().splitlines()[0][:160], error
            # What one process cannot read is damaged for all.
            reason = next((said for said in processes.exchange(reason) if said is not None), None)
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
        processes.exchange(None)
        self._manager = self._open()

    def restore_params(self, step: int, params: Any) -> Any:
        """The model's tree of one checkpoint alone. Raises ValueError when it cannot be read."""
        try:
            items = ocp.args.Composite(params=ocp.args.StandardRestore(params))
            return self._manager.restore(step, args=items)["params"]
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise ValueError(f"{self.folder}/{step}: cannot be read: {reason}") from error

    def close(self) -> None:
        """Waits for what is being written, then lets go of the folder."""
        self._guarded(None, self._manager.close)


def _goodness(metrics: dict[str, float]) -> float:
    return -metrics["val_loss"]


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
    checkpoints = Checkpoints(folder, read_only=True)
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
