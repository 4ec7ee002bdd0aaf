"""Bounds the number of programs in flight: dispatched but not finished."""

import collections
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax

T = TypeVar("T")


def bounded(results: Iterable[T]) -> Iterator[T]:
    """Yields the results of programs in order, as soon as they are ready, with at most two programs in
    flight.

    JAX dispatches asynchronously, so a loop that only dispatches enqueues all of its programs with their
    inputs and outputs. Two keep the device busy. On CPU the bound is one: the devices of a mesh share a
    thread pool, and if waiting programs fill it, a collective deadlocks because its last thread never starts.

    Args:
      results: a generator that dispatches one program per item. A result is any pytree of arrays, which later
        programs must not donate.
    """
    limit = 1 if jax.default_backend() == "cpu" else 2
    pending: collections.deque[T] = collections.deque()
    for result in results:
        pending.append(result)
        if len(pending) == limit:
            yield jax.block_until_ready(pending.popleft())
    while pending:
        yield jax.block_until_ready(pending.popleft())
