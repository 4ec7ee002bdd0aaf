"""Compilation for TPUs with libtpu, on a machine without one."""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental import topologies

from gptoss_jax.planning.compile_tpu import INSTALL, has_tpu_compiler

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def needs_libtpu(test: Callable) -> Callable:
    """Marks a test as `tpu`, and skips it without libtpu."""
    skip = pytest.mark.skipif(not has_tpu_compiler(), reason=f"libtpu is not installed: {INSTALL}")
    return pytest.mark.tpu(skip(test))


@contextlib.contextmanager
def tpu_devices(name: str) -> Iterator[list[jax.Device]]:
    """Yields the devices of a topology to compile for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        # Concurrent compilations would wait for each other's lock.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def on_tpus(function: Callable, shapes: list[tuple]) -> Iterator[str]:
    """Yields the compiled program's text for one device of each kind. `shapes` are (shape, dtype) of the
    arguments."""
    for name in TPUS:
        with tpu_devices(name) as devices:
            place = jax.sharding.SingleDeviceSharding(devices[0])
            arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
            yield jax.jit(function).lower(*arguments).compile().as_text()


# An operation that creates packed bytes (no scalar), which programs should only read.
BYTES_MADE = re.compile(r"= u8\[\d\S* (?!bitcast|parameter|get-tuple-element)")
