"""Dequantizing packed experts while loading: on the host by the compiled kernel, on accelerators by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.weights import BFLOAT16, assert_same_leaves, leaves

from gptoss_jax.checkpoints import lazy_tensors, sharded_io
from gptoss_jax.checkpoints.lazy_tensors import DequantizedTensor
from gptoss_jax.checkpoints.load import load_pretrained
from gptoss_jax.config import MeshConfig
from gptoss_jax.kernels.cpu import build, unpack
from gptoss_jax.kernels.mxfp4 import codec
from gptoss_jax.parallel.mesh import make_mesh

needs_compiler = pytest.mark.skipif(not build.is_available(), reason="needs a C++ compiler")
BITS = {2: np.uint16, 4: np.uint32}


def bits_of(blocks, scales):
    """Returns the reference's bfloat16 bits, [F, D]."""
    return np.stack(codec.bfloat16_bits(blocks, scales[..., None], np), axis=-1).reshape(len(blocks), -1)


def packed(rows, groups, scales=(0, 256), seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8)
    return blocks, rng.integers(*scales, (rows, groups), dtype=np.uint8)


@needs_compiler
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
def test_kernel_gives_the_bits_of_the_reference(dtype):
    itemsize = np.dtype(dtype).itemsize
    # Rows and groups around the kernel's tiles of 128 × 4 and vectors of 16; a part of a block at both ends.
    cases = [(1, 1, 0, 32), (19, 3, 0, 96), (128, 4, 5, 127), (160, 9, 31, 33), (261, 6, 33, 190)]
    for rows, groups, start, stop in cases:
        for scales in ((0, 256), (2, 253), (120, 130)):
            blocks, scales = packed(rows, groups, scales)
            expected = bits_of(blocks, scales).T[start:stop].astype(BITS[itemsize]) << 8 * (itemsize - 2)
            # Rows of the result aligned to vectors, and not.
            for width in (rows + -rows % 32, rows + 1):
                whole = np.full((stop - start, width), 3, dtype)
                unpack.unpack(blocks, scales, start, whole[:, :rows])
                np.testing.assert_array_equal(whole[:, :rows].view(BITS[itemsize]), expected)
                assert (whole[:, rows:] == 3).all()


@needs_compiler
def test_every_byte_under_every_scale():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 16, 16)).copy()
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16)).copy()
    found = np.empty((512, 256), BFLOAT16)
    unpack.unpack(blocks, scales, 0, found)
    np.testing.assert_array_equal(found.view(np.uint16), bits_of(blocks, scales).T)


@needs_compiler
def test_arrays_of_other_layouts_are_refused():
    blocks, scales = packed(16, 2)
    out = np.empty((64, 16), np.float32)
    with pytest.raises(AssertionError):
        unpack.unpack(blocks, scales, 1, out)
    with pytest.raises(AssertionError):
        unpack.unpack(blocks, scales, 0, np.empty((16, 64), np.float32).T)
    with pytest.raises(AssertionError):
        unpack.unpack(blocks[:, ::-1], scales, 0, out)


@needs_compiler
def test_setting_turns_the_kernel_off(monkeypatch):
    assert unpack.is_supported()
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "plain:mxfp4_unpack")
    assert not unpack.is_supported()


@needs_compiler
@pytest.mark.parametrize("experts", ["bfloat16", "float32"])
@pytest.mark.parametrize("mesh_config", [None, MeshConfig(fsdp=2, expert=2, tensor=2)])
def test_loaded_experts_are_those_of_the_plain_path(divisible_folder, monkeypatch, experts, mesh_config):
    mesh = mesh_config and make_mesh(mesh_config)
    calls = []
    monkeypatch.setattr(unpack, "unpack", lambda *a, f=unpack.unpack: (calls.append(a), f(*a)))
    found = leaves(load_pretrained(divisible_folder("mxfp4"), experts=experts, mesh=mesh)[1])
    assert calls
    calls.clear()
    monkeypatch.setenv("GPTOSS_JAX_KERNELS", "plain")
    expected = leaves(load_pretrained(divisible_folder("mxfp4"), experts=experts, mesh=mesh)[1])
    assert not calls
    assert_same_leaves(found, expected)


# Experts of 6 outputs (3 pairs of gate and up) and 96 inputs.
INDICES = [
    (slice(0, 4), slice(0, 96), slice(0, 2), slice(0, 3)),
    (slice(1, 3), slice(40, 77), slice(0, 2), slice(1, 3)),
    (slice(3, 4), slice(64, 96), slice(1, 2), slice(0, 2)),
]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("index", INDICES)
def test_devices_unpack_to_the_same_bits(monkeypatch, dtype, interleaved, index):
    monkeypatch.setattr(unpack, "is_supported", lambda: False)
    layers = []
    for seed in range(2):
        blocks, scales = packed(4 * 6, 3, (0, 250), seed)
        tensor = DequantizedTensor("s", blocks.reshape(4, 6, 3, 16), scales.reshape(4, 6, 3), interleaved)
        layers.append(tensor)
    index = index if interleaved else (*index[:2], slice(index[3].start, 2 * index[3].stop))
    sizes = [part.stop - part.start for part in index]
    expected = np.empty((2, *sizes), dtype)
    for row, layer in zip(expected, layers, strict=True):
        assert layer.read_into(row, index)
    places = [jax.sharding.SingleDeviceSharding(device) for device in jax.devices()[2:4]]
    formats = [sharded_io.Format(None, place) for place in places]
    monkeypatch.setattr(DequantizedTensor, "read_into", None)  # the host does not unpack
    made, non_finite = sharded_io._stack_on_devices(np.dtype(dtype), index, layers, formats)
    assert non_finite == set()
    assert [array.sharding for array in made] == places
    for array in made:
        np.testing.assert_array_equal(np.asarray(array).view(BITS[array.dtype.itemsize]),
                                      expected.view(BITS[array.dtype.itemsize]))  # fmt: skip


@pytest.mark.parametrize(
    ("code", "scale", "is_finite"), [(0x77, 253, False), (0x22, 253, True), (0, 255, False)]
)
def test_devices_find_values_that_are_not_finite(code, scale, is_finite):
    blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.full((1, 2, 1), 120, np.uint8)
    blocks[0, 1], scales[0, 1] = code, scale
    tensor = DequantizedTensor("layer.scales", blocks, scales)
    index = tuple(slice(0, size) for size in tensor.shape)
    place = sharded_io.Format(None, jax.sharding.SingleDeviceSharding(jax.devices()[1]))
    _, non_finite = sharded_io._stack_on_devices(np.dtype(jnp.bfloat16), index, [tensor], [place])
    assert non_finite == (set() if is_finite else {"layer.scales"})
    out = np.empty(tensor.shape, lazy_tensors.BFLOAT16)
    assert tensor.read_into(out, index) == is_finite
