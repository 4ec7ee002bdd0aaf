"""Training checkpoints with Orbax: sharded arrays and a JSON record, written asynchronously.

A checkpoint has the items `params` (the model's tree), `training` (the rest of the train state) and `record`
(data position, config, tokenizer: everything else needed to resume). It is renamed to its final name when it
is complete.
"""

import contextlib
import json
import logging
import math
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from gptoss_jax.checkpoints.orbax_patches import LocalPath
from gptoss_jax.checkpoints.run_arrays import open_arrays, root_message, save_args
from gptoss_jax.config import require
from gptoss_jax.config.base import listed
from gptoss_jax.config.paths import require_utf8
from gptoss_jax.model.parameters import letters_of, path_names, tree_bytes
from gptoss_jax.parallel import distributed

OVERHEAD = 2 << 20  # bytes per checkpoint besides the arrays: indices, record, partially filled blocks


class Checkpoints:
    """Saves and restores the checkpoints of one run folder."""

    def __init__(
        self,
        run_dir: str | pathlib.Path,
        keep: int = 2,
        read_only: bool = False,
        eval_batches: int | None = None,
    ):
        """Keeps the `keep` latest checkpoints and the one with the lowest finite validation loss.

        Ignores losses measured on a number of batches other than `eval_batches`, unless it is None.
        """
        self.folder = pathlib.Path(run_dir).absolute() / "checkpoints"
        check_folder_name(self.folder, "run_dir", str(run_dir))
        self._verified, self._eval_batches = False, eval_batches
        # Orbax logs routine steps as warnings and errors; actual failures are raised.
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
        return _Manager(LocalPath(self.folder), self._options, self._eval_batches)

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    @property
    def best_step(self) -> int | None:
        """Step with the lowest validation loss; None if no checkpoint has a finite one."""
        return None if self.best_loss == math.inf else self._manager.best_step()

    @property
    def best_loss(self) -> float:
        """Lowest finite validation loss of the checkpoints on disk; infinity if there is none."""
        step = self._manager.best_step()
        metrics = None if step is None else self._manager.metrics(step)
        return math.inf if metrics is None else -_goodness(metrics)

    def record(self, step: int) -> dict[str, Any]:
        """Returns the record of a checkpoint; empty if it cannot be read, which `restore` reports."""
        try:
            return json.loads((self.folder / str(step) / "record" / "metadata").read_bytes())
        except (OSError, ValueError):
            return {}

    def parameter_paths(self, step: int) -> set[tuple[str, ...]]:
        """Returns the paths of the parameters in a checkpoint: all of the model's, or only the trained ones.

        Raises ValueError if it cannot be read.
        """
        try:
            tree = self._manager.item_metadata(step)["params"].tree
        except Exception as error:  # Orbax, TensorStore and JSON each have their own
            raise self._unreadable(step, f"params: {root_message(error)}") from error
        return {path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}

    def save(
        self, step: int, params: Any, training: Any, record: dict[str, Any], val_loss: float | None = None
    ) -> None:
        """Copies the trees to the host and returns; the files are written asynchronously.

        The first save waits until the checkpoint is on disk and verifies it, so that storage that loses data
        costs no more than the steps before the first checkpoint. `val_loss` is ignored if not finite.

        Raises OSError if this or an earlier checkpoint could not be written; existing ones are kept.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args(params)),
            training=ocp.args.StandardSave(training),
            record=ocp.args.JsonSave(record),
        )
        has_loss = val_loss is not None and math.isfinite(val_loss)
        metrics = {"val_loss": val_loss} if has_loss else None
        needed = tree_bytes((params, training)) + OVERHEAD
        if jax.process_index() == 0 and (free := shutil.disk_usage(self.folder).free) < needed:
            raise OSError(
                f"{self.folder}: the checkpoint of step {step} could not be written: it needs "
                f"{needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left; {self._last()}"
            )
        self._guarded(step, lambda: self._manager.save(step, args=items, metrics=metrics, force=True))
        if not self._verified:
            self.wait()
            self._verify(step, {"params": params, "training": training})
            self._verified = True

    def _verify(self, step: int, trees: dict[str, Any]) -> None:
        """Raises OSError if a checkpoint is incomplete, and sets it aside. Does not read array values."""
        reason = None
        if jax.process_index() == 0:
            try:
                found = self._manager.item_metadata(step)
                for name, tree in trees.items():
                    have, expected = (len(jax.tree.leaves(one)) for one in (found[name].tree, tree))
                    if have != expected:
                        reason = f"{name} has {have} arrays of {expected}"
                json.loads((self.folder / str(step) / "record" / "metadata").read_bytes())
            except Exception as error:  # Orbax, TensorStore and JSON each have their own
                reason = root_message(error)
        reason = distributed.allgather_host(reason)[0]
        if reason is not None:
            self._set_aside([step])
            raise OSError(
                f"{self.folder}: the checkpoint of step {step} was written but is incomplete: {reason}"
            )

    def _last(self) -> str:
        return f"the last complete one is of step {self.steps[-1]}" if self.steps else "there is none yet"

    def wait(self) -> None:
        """Waits until all writes are on disk. Raises OSError if one failed."""
        self._guarded(None, self._manager.wait_until_finished)

    def _guarded(self, step: int | None, action: Callable[[], Any]) -> None:
        # The exception type depends on the layer and thread that hit the full disk.
        try:
            action()
        except Exception as error:
            which = "a checkpoint" if step is None else f"the checkpoint of step {step} (or the one before)"
            raise OSError(
                f"{self.folder}: {which} could not be written: {root_message(error)}; {self._last()}"
            ) from error

    def restore(
        self, params: Any, training: Any, report: Callable[[str], None] = print
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """Restores the latest readable checkpoint, with the shardings of the abstract trees.

        A damaged checkpoint is described to `report` in one line and renamed to `damaged-STEP`, and the one
        before it is used. Returns (step, params, training, record), or None if there is no checkpoint. Raises
        ValueError if there are checkpoints but none can be read.
        """
        steps = self.steps
        damaged: list[int] = []
        for step in reversed(steps):
            self._check_parameters(step, {"params": params, "training": training})
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
            # If one process cannot read a checkpoint, all skip it.
            reason = next((said for said in distributed.allgather_host(reason) if said is not None), None)
            if reason is None:
                self._set_aside(damaged)
                return step, restored["params"], restored["training"], restored["record"]
            if step == steps[0]:
                raise ValueError(
                    f"{self.folder}: no checkpoint can be read; that of step {step}: {reason}"
                ) from cause
            damaged.append(step)
            report(f"checkpoint of step {step} is damaged ({reason}); using the one before")
        return None

    def _check_parameters(self, step: int, trees: dict[str, Any]) -> None:
        """Raises ValueError if a checkpoint has other trainable parameters, which does not mean damage."""
        try:
            metadata = self._manager.item_metadata(step)
            found = {name: _parameters(metadata[name].tree) for name in trees}
        except Exception:  # `restore` reports what is damaged
            return
        for name, tree in trees.items():
            theirs, ours = found[name], _parameters(tree)
            only = {"it also has": theirs - ours, "it lacks": ours - theirs}
            said = [f"{what} {listed(sorted(names))}" for what, names in only.items() if names]
            if theirs and said:
                raise ValueError(
                    f"{self.folder}: the checkpoint of step {step} is of a run that trained other parameters "
                    f"({'; '.join(said)}): resume it with the same is_trainable"
                )

    def _set_aside(self, steps: list[int]) -> None:
        """Renames the folders of damaged checkpoints; must be called on all processes."""
        if not steps:
            return
        self._manager.close()
        if jax.process_index() == 0:
            for step in steps:
                target, count = self.folder / f"damaged-{step}", 0
                while target.exists():
                    count += 1
                    target = self.folder / f"damaged-{step}-{count}"
                (self.folder / str(step)).rename(target)
        distributed.barrier()
        self._manager = self._open()

    def restore_params(self, step: int, params: Any) -> Any:
        """Restores only the parameters of a checkpoint. Raises ValueError if it cannot be read."""
        try:
            return self._read(step, {"params": ocp.args.StandardRestore(params)})["params"]
        except ValueError as error:
            raise self._unreadable(step, error) from error

    def open_params(self, step: int, params: Any) -> Any:
        """Opens the parameters of a checkpoint without reading them, as `StoredArray`s in the abstract tree.

        Raises ValueError if they cannot be opened.
        """
        try:
            return open_arrays(self.folder / str(step) / "params", params)
        except ValueError as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, reason: ValueError | str) -> ValueError:
        others = ", ".join(str(other) for other in self.steps if other != step)
        hint = f"resuming the run sets it aside and uses another ({others})"
        hint = hint if others else "there is no other one"
        return ValueError(f"{self.folder}/{step}: cannot be read ({reason}); {hint}")

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        """Reads items of a checkpoint. Raises ValueError with the item's name if it is missing or damaged."""
        found = {}
        for name, arguments in items.items():
            try:
                one = self._manager.restore(step, args=ocp.args.Composite(**{name: arguments}))
            except Exception as error:  # Orbax, TensorStore and JSON each raise their own for a damaged file
                _raise_interrupt(error)
                raise ValueError(f"{name}: {root_message(error)}") from error
            found[name] = one.get(name)
            if not isinstance(found[name], dict):
                raise ValueError(f"{name}: must be a {'JSON object' if name == 'record' else 'tree'}")
        return found

    def close(self) -> None:
        """Waits for pending writes, then closes the manager."""
        self._guarded(None, self._manager.close)


def _parameters(tree: Any) -> set[str]:
    """Names of the parameters in a tree, or that it holds an optimizer's state of, such as
    `blocks.0.attention.q`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree) if letters_of(path)]
    starts = (names[-4:] if "blocks" in names else names[-2:] for names in map(path_names, paths))
    return {".".join(names) for names in starts}


def _goodness(metrics: dict[str, float]) -> float:
    """Returns the negative loss. A non-finite loss, as stored by older runs, is worse than any other."""
    loss = metrics["val_loss"]
    return -loss if math.isfinite(loss) else -math.inf


def check_folder_name(folder: pathlib.Path, field: str, value: str) -> None:
    """Raises ValueError for a folder name that TensorStore cannot handle or would interpret differently.

    `folder` is absolute; `field` and `value` name the setting in the error message.
    """
    path = folder.as_posix()
    require("\\" not in path, field, value, "no folder in its path may have a backslash in its name")
    require("gs:/" not in path, field, value, "no folder in its path may have a name that ends with 'gs:'")
    require_utf8(value, field)


def _raise_interrupt(error: BaseException | None) -> None:
    """Raises KeyboardInterrupt if that is what an error of a library means."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        error = error.__cause__


class _Manager(ocp.CheckpointManager):
    """A checkpoint manager that treats unreadable or incomparable metrics as missing.

    Orbax reads all metrics when opening, so one damaged file would make every checkpoint unreadable. Metrics
    are comparable if they were measured with the same `eval_batches`, or if that is None.
    """

    def __init__(self, folder: LocalPath, options: ocp.CheckpointManagerOptions, eval_batches: int | None):
        self._eval_batches = eval_batches
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "training": ocp.StandardCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        }
        super().__init__(folder, options=options, item_handlers=handlers)

    def metrics(self, step: int) -> Any:
        try:
            found = super().metrics(step)
            if found is None:
                return None
            float(found["val_loss"])
        except (ValueError, TypeError, KeyError) as error:
            path = self.directory / str(step) / "metrics"
            warnings.warn(f"{path}: damaged ({error!r}); its validation loss is ignored", stacklevel=2)
            return None
        with contextlib.suppress(
            OSError, ValueError, TypeError, KeyError
        ):  # `restore` reports a damaged record
            record = json.loads((self.directory / str(step) / "record" / "metadata").read_bytes())
            if self._eval_batches not in (None, record["config"]["eval"]["batches"]):
                return None
        return found
