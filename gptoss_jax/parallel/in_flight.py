"""A bound on the programs that are dispatched and not finished.

JAX returns from a call before the device has run it. A loop that only dispatches therefore queues a program
for every iteration, and holds the inputs and outputs of all of them. On CPU it can also deadlock: the devices
of a mesh share one thread pool, and when it is full of waiting programs, a collective never gets the thread
of its last device.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")

# One program runs while the next one waits. More would not make the device any busier.
LIMIT = 2


def limit() -> int:
    """The most programs in flight: `LIMIT`, but one on CPU, whose devices share the threads of the host."""
    return 1 if jax.default_backend() == "cpu" else LIMIT


def bounded(results: Iterable[T]) -> Iterator[T]:
    """Yields results of programs in order, each when it is ready, with at most `limit()` of them in flight.

    Args:
      results: dispatches one program for each item when it is asked for it, so pass a generator. A result is
        any tree of arrays, which no later program may be given to donate.
    """
    pending: collections.deque[T] = collections.deque()
    most = limit()
    for result in results:
        pending.append(result)
        if len(pending) == most:
            yield jax.block_until_ready(pending.popleft())
    while pending:
        yield jax.block_until_ready(pending.popleft())
