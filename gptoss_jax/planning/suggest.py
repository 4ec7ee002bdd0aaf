"""Finds the smallest change of the batch with which a training step fits, or fits more meshes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from gptoss_jax.config import TrainConfig
from gptoss_jax.parallel.mesh import divisors
from gptoss_jax.planning.estimate import Estimate

# Estimates of a config on all meshes in question, best first; raises ValueError if there are none.
Estimates = Callable[[TrainConfig], Sequence[Estimate]]


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A flag of `gptoss train`, such as "--data.batch-size 16", and the best estimate with it."""

    flag: str
    estimate: Estimate


def suggest_smaller(config: TrainConfig, estimates: Estimates) -> Suggestion | None:
    """Returns the fewest microbatches with which a step fits; if no number is enough, the largest batch."""
    batch, steps = config.data.batch_size, config.optim.grad_accum_steps
    more = (count for count in divisors(batch, batch) if count > steps)
    fewer = (count * steps for count in reversed(divisors(batch // steps, batch // steps - 1)))
    for flag, other in (*_with_steps(config, more), *_with_batch(config, fewer)):
        best = _best(other, estimates)
        if best is not None and best.fits:
            return Suggestion(flag, best)
    return None


def suggest_larger_microbatch(
    config: TrainConfig, devices: int, best: Estimate, estimates: Estimates
) -> Suggestion | None:
    """Returns the fewest microbatches that fit, if those of the config have fewer rows than devices, and so
    rule out most meshes; None if they do not, or if no larger microbatch is faster."""
    batch, steps = config.data.batch_size, config.optim.grad_accum_steps
    if batch // steps >= devices:
        return None
    for flag, other in _with_steps(config, divisors(steps, steps - 1)):
        found = _best(other, estimates)
        if found is not None and found.fits and found.serial_seconds < best.serial_seconds:
            return Suggestion(flag, found)
    return None


def _with_steps(
    config: TrainConfig, counts: Sequence[int] | Iterator[int]
) -> Iterator[tuple[str, TrainConfig]]:
    for count in counts:
        if config.data.batch_size % count == 0:
            optim = dataclasses.replace(config.optim, grad_accum_steps=count)
            yield f"--optim.grad-accum-steps {count}", dataclasses.replace(config, optim=optim)


def _with_batch(config: TrainConfig, sizes: Iterator[int]) -> Iterator[tuple[str, TrainConfig]]:
    for size in sizes:
        data = dataclasses.replace(config.data, batch_size=size)
        yield f"--data.batch-size {size}", dataclasses.replace(config, data=data)


def _best(config: TrainConfig, estimates: Estimates) -> Estimate | None:
    try:
        return estimates(config)[0]
    except ValueError:
        return None
