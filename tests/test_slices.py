"""Slices joined by the data-center network: which devices a mesh places where, and what leaves a slice."""

import dataclasses
import re

import numpy as np
import pytest
from helpers.tpu_compiler import needs_libtpu

from gptoss_jax.cli import main
from gptoss_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from gptoss_jax.parallel.mesh import make_mesh
from gptoss_jax.planning.compile_tpu import compile_step
from gptoss_jax.planning.hlo import collectives


@dataclasses.dataclass(frozen=True)
class Device:
    """What `mesh_utils` reads of a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "fake"


def slices_of(config, devices=None):
    """Returns the slice of each device of a mesh of eight, in two halves of the ids."""
    return np.vectorize(lambda device: device.id // 4)(make_mesh(config, devices).devices)


@pytest.mark.parametrize(
    "devices",
    [
        None,  # simulated
        [Device(i, process_index=0, slice_index=i // 4) for i in range(8)],
        [Device(i, process_index=i // 4) for i in range(8)],
        [Device(i, process_index=i // 2, slice_index=i // 4) for i in reversed(range(8))],
    ],
    ids=["simulated", "slices", "processes", "slices of two processes"],
)
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MeshConfig(data=4, tensor=2, dcn_data=2), [[[[0, 0]]], [[[0, 0]]], [[[1, 1]]], [[[1, 1]]]]),
        (MeshConfig(data=-1, expert=4, dcn_data=2), [[[[0]] * 4], [[[1]] * 4]]),
        (MeshConfig(data=2, fsdp=4, dcn_fsdp=2), [[[[0]], [[0]], [[1]], [[1]]]] * 2),
    ],
    ids=["data", "all data", "fsdp"],
)
def test_only_the_outermost_steps_leave_a_slice(config, expected, devices):
    assert slices_of(config, devices)[:, :, 0].tolist() == expected  # without the context axis


def test_any_axis_may_lead_to_another_node_of_gpus():
    devices = [Device(i, process_index=i // 4, slice_index=i // 4) for i in range(8)]
    assert slices_of(MeshConfig(data=1, expert=8), devices).ravel().tolist() == [0] * 4 + [1] * 4


def test_two_axes_join_four_slices():
    devices = [Device(i, process_index=0, slice_index=i // 2) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, dcn_data=2, dcn_fsdp=2), devices)
    found = [[device.slice_index for device in row] for row in mesh.devices.reshape(2, 4)]
    assert found == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"data": 4, "dcn_data": 3}, None, "mesh.dcn_data is 3: must divide mesh.data (4), of which it is"),
        (
            {"dcn_fsdp": 2},
            None,
            "mesh.dcn_fsdp is 2: must divide mesh.fsdp (1), of which it is the number of",
        ),
        ({"dcn_data": 0}, None, "mesh.dcn_data is 0: must be above 0"),
        (
            {"dcn_data": 3},
            None,
            "mesh.dcn_data is 3: must divide mesh.data (8), of which it is the number of",
        ),
        (
            {"data": 8},
            [Device(i, 0, slice_index=i // 4, platform="tpu") for i in range(8)],
            "mesh.dcn_data is 1: mesh.dcn_data times mesh.dcn_fsdp must be 2, the number of slices of these",
        ),
        (
            {"data": 2, "fsdp": 4, "dcn_fsdp": 4},
            [Device(i, process_index=i // 4) for i in range(8)],
            "mesh.dcn_fsdp is 4: mesh.dcn_data times mesh.dcn_fsdp must be 2, the number of processes",
        ),
        (
            {"dcn_data": 2},
            [Device(i, process_index=i // 4, platform="tpu") for i in range(8)],
            "mesh.dcn_data is 2: mesh.dcn_data times mesh.dcn_fsdp must be 1, the number of slices of these",
        ),
    ],
)
def test_errors_name_the_setting_and_what_is_allowed(sizes, devices, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        make_mesh(MeshConfig(**sizes), devices)


PROGRAM = """
ENTRY %main {
  %all-reduce.3 = bf16[512,512]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}
  %send = (bf16[64,8,128]{2,1,0}, u32[], token[]) send(%x, %after), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[64,8,128]{2,1,0}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %other = (f32[8]{0}, u32[], token[]) send(%y, %after), channel_id=4, is_host_transfer=true
}
"""


def test_transfers_between_slices_are_counted_apart():
    inside, across = collectives(PROGRAM.replace("%main {", "%main (input: f32[]) -> f32[] {"))
    assert (inside.kind, inside.across_slices, inside.sent) == (
        "all-reduce",
        False,
        2 * 512 * 512 * 2 * 3 / 4,
    )
    assert (across.kind, across.across_slices, across.sent) == ("all-reduce", True, 64 * 8 * 128 * 2)


SMALL = TrainConfig(
    model=ModelConfig(
        vocab_size=96, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, num_local_experts=12, num_experts_per_tok=3, sliding_window=8,
    ),
    data=DataConfig(seq_len=64, batch_size=16),
    mesh=MeshConfig(data=2, fsdp=2, expert=2, dcn_data=2),
)  # fmt: skip


@needs_libtpu
def test_a_step_for_two_slices_sums_gradients_between_them():
    compiled = compile_step(SMALL, "v5p:2x2x1", {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1})
    assert compiled.fits
    if compiled.collectives is None:
        pytest.skip("this jaxlib cannot read libtpu's program")
    across = [entry for entry in compiled.collectives if entry["across_slices"]]
    assert {entry["kind"] for entry in across} == {"all-reduce"}
    assert all(entry["axes"] == ["data"] for entry in across)
    sent = sum(entry["sent"] for entry in across)
    # All gradients, a quarter on each device: of attention in bfloat16, of the others in float32. The
    # compiler pads.
    attention, experts, vocabulary = 256 * 16 * (2 * 8 + 2 * 4), 12 * 3 * 256 * 128, 96 * 256
    least = 2 * (2 * attention + 4 * experts + 4 * vocabulary) / 4
    assert least <= sent <= 1.25 * least


def test_the_mesh_flags_of_plan_have_slices(tmp_path, capsys):
    path = tmp_path / "small.py"
    config = dataclasses.replace(SMALL, mesh=MeshConfig()).to_dict()
    path.write_text(f"from gptoss_jax.config import TrainConfig\nconfig = TrainConfig.from_dict({config})")
    flags = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.dcn-data", "2"]
    assert main.main(["plan", str(path), "--chip", "v5p", "--devices", "8", *flags]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert "--mesh.dcn-data 2" in command and "--mesh.expert 2" in command
