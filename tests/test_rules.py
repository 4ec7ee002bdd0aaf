"""Sharding rules: which mesh axes split each letter of a parameter, in storage and in use."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import LoraConfig, MeshConfig
from gptoss_jax.config.model import LORA_TARGETS
from gptoss_jax.model.parameters import LETTERS, parameter_name, parameter_shardings
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel.mesh import AXES, make_mesh
from gptoss_jax.parallel.rules import COMPUTE, STORAGE, compute_spec, spec_axes, storage_spec

# Sizes of the axes in tests by hand. All differ.
AXIS_SIZES = {"data": 7, "fsdp": 2, "expert": 3, "tensor": 5}


@pytest.mark.parametrize(
    ("letters", "shape", "expected"),
    [
        # Every letter that is split, with a size that the spare axis does not divide.
        ("V", (10,), P("tensor")),
        ("N", (10,), P("tensor")),
        ("K", (10,), P("tensor")),
        ("F", (10,), P("tensor")),
        ("D", (10,), P("fsdp")),
        ("E", (6,), P("expert")),
        ("O", (10,), P(("tensor", "fsdp"))),
        ("U", (20,), P(("tensor", "fsdp"))),
        # Letters that are never split, at any size.
        ("d", (30,), P(None)),
        ("e", (30,), P(None)),
        ("HPgfy", (30, 30, 30, 30, 30), P(None, None, None, None, None)),
        ("", (30, 30), P(None, None)),
        ("", (), P()),
        # Several letters, and stacked layers in front of them.
        ("NH", (5, 7), P("tensor", None)),
        ("EDPF", (3, 4, 2, 5), P("expert", "fsdp", None, "tensor")),
        ("NH", (4, 5, 7), P(None, "tensor", None)),
        ("EPF", (4, 3, 2, 5), P(None, "expert", None, "tensor")),
    ],
)
def test_letters_are_split_in_storage(letters, shape, expected):
    assert storage_spec(letters, shape, AXIS_SIZES) == expected


@pytest.mark.parametrize(
    ("letters", "shape", "expected"),
    [
        ("D", (6,), P(("fsdp", "expert"))),
        ("D", (4,), P("fsdp")),
        ("V", (15,), P(("tensor", "expert"))),
        ("V", (10,), P("tensor")),
        ("DNH", (6, 5, 7), P(("fsdp", "expert"), "tensor", None)),
        ("NHD", (5, 7, 6), P("tensor", None, ("fsdp", "expert"))),
        ("De", (4, 6, 8), P(None, ("fsdp", "expert"), None)),
        # Along the vocabulary first, and not along the hidden dimension where the vocabulary does not divide.
        ("VD", (15, 6), P(("tensor", "expert"), "fsdp")),
        ("VD", (10, 6), P("tensor", "fsdp")),
        # Experts already use the axis; other letters never do.
        ("EFD", (3, 5, 6), P("expert", "tensor", "fsdp")),
        ("EO", (3, 30), P("expert", ("tensor", "fsdp"))),
        ("NK", (15, 15), P("tensor", "tensor")),
    ],
)
def test_the_expert_axis_also_splits_the_vocabulary_or_hidden_dimension(letters, shape, expected):
    assert storage_spec(letters, shape, AXIS_SIZES) == expected


def test_axes_of_one_device_are_named_in_the_spec():
    sizes = dict.fromkeys(AXES, 1)
    assert storage_spec("VD", (7, 11), sizes) == P(("tensor", "expert"), "fsdp")


@pytest.mark.parametrize(
    ("letters", "shape", "message"),
    [
        ("V", (7,), "mesh.tensor is 5: must divide 7, a size of x; valid sizes: 1, 7"),
        ("DNH", (4, 6, 5), "mesh.tensor is 5: must divide 6, a size of x; valid sizes: 1, 2, 3, 6"),
        ("D", (9,), "mesh.fsdp is 2: must divide 9, a size of x; valid sizes: 1, 3, 9"),
        ("E", (8,), "mesh.expert is 3: must divide 8, a size of x; valid sizes: 1, 2, 4, 8"),
        (
            "O",
            (15,),
            "mesh.tensor times mesh.fsdp is 10: must divide 15, a size of x; valid sizes: 1, 3, 5, 15",
        ),
        # 10 rows could be split over 10 devices, but not without separating gate from up.
        ("U", (10,), "mesh.tensor times mesh.fsdp is 10: must divide 5, the pairs of x; valid sizes: 1, 5"),
    ],
)
def test_errors_name_the_axis_and_the_valid_sizes(letters, shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        storage_spec(letters, shape, AXIS_SIZES, "x")


@pytest.mark.parametrize(
    ("letters", "shape", "expected"),
    [
        ("DNH", (18, 5, 7), P(("fsdp", "context"), "tensor", None)),
        ("EFD", (4, 5, 18), P("expert", "tensor", ("fsdp", "context"))),
        ("DNH", (24, 5, 7), P(("fsdp", "context", "expert"), "tensor", None)),
        # Not divisible by 2 times 3 devices.
        ("EDPF", (4, 4, 2, 5), P("expert", "fsdp", None, "tensor")),
        ("EUg", (4, 120, 2), P("expert", ("tensor", "fsdp", "context"), None)),
        # 20 pairs of rows.
        ("EUg", (4, 40, 2), P("expert", ("tensor", "fsdp"), None)),
    ],
)
def test_fsdp_also_uses_the_context_axis(letters, shape, expected):
    sizes = {"data": 7, "fsdp": 2, "context": 3, "expert": 4, "tensor": 5}
    assert storage_spec(letters, shape, sizes) == expected


def test_valid_sizes_fit_the_devices():
    with pytest.raises(ValueError, match="must divide 60, a size of x; valid sizes: 1, 2, 3, 4, 5, 6"):
        storage_spec("V", (60,), {"data": 1, "fsdp": 1, "expert": 1, "tensor": 7}, "x")


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("VD", P("tensor", None)),
        ("DNH", P(None, "tensor", None)),
        ("DKH", P(None, "tensor", None)),
        ("NHD", P("tensor", None, None)),
        ("N", P("tensor")),
        ("De", P(None, None)),
        ("d", P(None)),
        ("EDPF", P("expert", None, None, "tensor")),
        ("EFD", P("expert", "tensor", None)),
        ("Ed", P("expert", None)),
        ("EUgy", P("expert", "tensor", None, None)),
        ("EOf", P("expert", "tensor", None)),
    ],
)
def test_parameters_are_gathered_over_fsdp_for_use(letters, expected):
    assert compute_spec(letters) == expected


@pytest.mark.parametrize("letters", LETTERS.values())
def test_compute_splits_are_those_of_storage_without_fsdp(letters):
    """Use only gathers: a parameter is never split further, or over another axis, than it is stored."""
    stored = storage_spec(letters, (60,) * len(letters), dict.fromkeys(AXES, 1))
    for before, after in zip(map(spec_axes, stored), map(spec_axes, compute_spec(letters)), strict=True):
        gathered = set(before) - set(after)
        assert before[: len(after)] == after
        assert gathered <= {"fsdp", "expert"}


def test_letters_use_only_axes_of_the_mesh():
    assert {axis for axes in STORAGE.values() for axis in axes} | set(COMPUTE) <= set(AXES)
    assert "data" not in {axis for axes in STORAGE.values() for axis in axes}


@pytest.mark.parametrize(
    ("entry", "expected"), [(None, ()), ("fsdp", ("fsdp",)), (("tensor", "fsdp"), ("tensor", "fsdp"))]
)
def test_axes_of_a_spec_entry(entry, expected):
    assert spec_axes(entry) == expected


FSDP_EXPERT = ("fsdp", "expert")
# Storage of one layer's parameters on a mesh of fsdp 2, expert 2 and tensor 2 that divides all sizes.
EXPECTED = {
    "embedding.weight": P(("tensor", "expert"), "fsdp"),
    "head.weight": P(("tensor", "expert"), "fsdp"),
    "attention_norm.scale": P(None),
    "attention.q": P(FSDP_EXPERT, "tensor", None),
    "attention.k": P(FSDP_EXPERT, "tensor", None),
    "attention.v": P(FSDP_EXPERT, "tensor", None),
    "attention.out": P("tensor", None, FSDP_EXPERT),
    "attention.q_bias": P("tensor", None),
    "attention.k_bias": P("tensor", None),
    "attention.v_bias": P("tensor", None),
    "attention.out_bias": P(None),
    "attention.sinks": P("tensor"),
    "moe_norm.scale": P(None),
    "moe.router": P(FSDP_EXPERT, None),
    "moe.router_bias": P(None),
    "moe.gate_up": P("expert", "fsdp", None, "tensor"),
    "moe.gate_up_bias": P("expert", None, "tensor"),
    "moe.down": P("expert", "tensor", "fsdp"),
    "moe.down_bias": P("expert", None),
    "moe.gate_up_blocks": P("expert", ("tensor", "fsdp"), None, None),
    "moe.gate_up_scales": P("expert", ("tensor", "fsdp"), None),
    "moe.down_blocks": P("expert", ("tensor", "fsdp"), None, None),
    "moe.down_scales": P("expert", ("tensor", "fsdp"), None),
    "final_norm.scale": P(None),
    **{f"attention.{name}_lora_a": P(FSDP_EXPERT, None) for name in "qkv"},
    **{f"attention.{name}_lora_b": P(None, "tensor", None) for name in "qkv"},
    "attention.out_lora_a": P("tensor", None, None),
    "attention.out_lora_b": P(None, FSDP_EXPERT),
    "moe.router_lora_a": P(FSDP_EXPERT, None),
    "moe.router_lora_b": P(None, None),
    "moe.gate_up_lora_a": P("expert", "fsdp", None),
    "moe.gate_up_lora_b": P("expert", None, None, "tensor"),
    "moe.down_lora_a": P("expert", "tensor", None),
    "moe.down_lora_b": P("expert", None, "fsdp"),
    "head.lora_a": P(FSDP_EXPERT, None),
    "head.lora_b": P(("tensor", "expert"), None),
}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


def storage_of(config, mesh):
    """Returns the spec of every parameter by name, without the dimension of stacked layers."""
    specs = {}
    shardings = jax.tree_util.tree_leaves_with_path(parameter_shardings(abstract_params(config), mesh))
    for path, sharding in shardings:
        name, spec = parameter_name(path), sharding.spec
        if path[0].key == "blocks":
            assert spec[0] is None
            spec = P(*spec[1:])
        assert specs.setdefault(name, spec) == spec  # the same in every block of the period
    return specs


@pytest.mark.parametrize("expert_format", ["plain", "mxfp4"])
def test_every_parameter_is_stored_as_expected(tiny_config, mesh, expert_format):
    sizes = dict(vocab_size=100, hidden_size=96, intermediate_size=64, num_local_experts=6)
    sizes["lora"] = LoraConfig(rank=3, targets=LORA_TARGETS)
    found = storage_of(dataclasses.replace(tiny_config, expert_format=expert_format, **sizes), mesh)
    packed = {name for name in LETTERS if name.endswith(("_blocks", "_scales"))}
    stored = {"plain": set(LETTERS) - packed, "mxfp4": set(LETTERS) - {"moe.gate_up", "moe.down"}}
    assert found == {name: EXPECTED[name] for name in stored[expert_format]}


def test_the_spare_axis_is_left_out_where_it_does_not_divide(tiny_config, mesh):
    sizes = dict(vocab_size=98, hidden_size=26, num_local_experts=6)
    found = storage_of(dataclasses.replace(tiny_config, **sizes), mesh)
    assert found["embedding.weight"] == found["head.weight"] == P("tensor", "fsdp")
    for name in ("q", "k", "v"):
        assert found[f"attention.{name}"] == P("fsdp", "tensor", None)
    assert found["attention.out"] == P("tensor", None, "fsdp")
    assert found["moe.router"] == P("fsdp", None)
    same = {"moe.gate_up", "moe.down", "attention.q_bias", "attention.sinks"}
    assert {name: found[name] for name in same} == {name: EXPECTED[name] for name in same}


def test_every_declared_parameter_has_an_expectation():
    assert EXPECTED.keys() == LETTERS.keys()


def test_optimizer_state_is_split_like_its_parameters(mesh):
    state = {
        "step": jnp.int32(0),
        "key": jnp.zeros(2, jnp.uint32),
        "mu": {"blocks": {"0": {"attention": {"q": jnp.zeros((2, 96, 6, 8))}}}},
        "ns_coeffs": jnp.zeros(3),
    }
    found = jax.tree.map(lambda sharding: sharding.spec, parameter_shardings(state, mesh))
    assert found == {
        "step": P(),
        "key": P(None),
        "mu": {"blocks": {"0": {"attention": {"q": P(None, FSDP_EXPERT, "tensor", None)}}}},
        "ns_coeffs": P(None),
    }
