"""Programs through the real TPU compiler, for devices that are not here."""

import importlib.util
from collections.abc import Callable, Iterator

import jax
import pytest
from jax.experimental import topologies

TPUS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def on_tpus(function: Callable, shapes: list[tuple]) -> Iterator[str]:
    """The compiled program's text for one device of each kind; shapes and types are the arguments'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        # Programs that compile side by side would wait for each other's lock.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        for name in TPUS:
            device = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
            place = jax.sharding.SingleDeviceSharding(device)
            arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
            yield jax.jit(function).lower(*arguments).compile().as_text()
