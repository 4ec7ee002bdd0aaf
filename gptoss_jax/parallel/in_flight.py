"""A bound on the programs that are dispatched and not finished."""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


def bounded(results: Iterable[T]) -> Iterator[T]:
    """Yields the results of programs in order, each when it is ready, with at most two programs in flight.

    JAX returns from a call before the device has run it, so a loop that only dispatches queues all of its
    programs with their inputs and outputs. Two keep the device busy. On CPU the bound is one: the devices of
    a mesh share a thread pool, and when it is full of waiting programs, a collective never gets its last
    thread.

    Args:
      results: a generator that dispatches one program for each item. A result is any tree of arrays, which
        no later program may donate.
    """
    limit = 1 if jax.default_backend() == "cpu" else 2
    pending: collections.deque[T] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) == limit:
            yield jax.block_until_ready(pending.popleft())
    while pending:
        yield jax.block_until_ready(pending.popleft())
