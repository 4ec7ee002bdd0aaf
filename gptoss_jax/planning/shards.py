"""Per-device shards of a train state, of frozen weights and of a served model, from shapes."""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from gptoss_jax.config import ModelConfig, TrainConfig
from gptoss_jax.model.fake_quant import exported_config
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.model.parameters import Path, letters_of, parameter_shardings, path_names, split_params
from gptoss_jax.model.transformer import abstract_params
from gptoss_jax.parallel.mesh import AXES, sequence_shards
from gptoss_jax.parallel.rules import compute_spec, spec_axes
from gptoss_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter on one device: its path, elements, itemsize in compute, and the mesh axes that shard it in
    storage and over which it is gathered for compute."""

    names: tuple[str, ...]
    size: int
    itemsize: int
    is_trained: bool
    axes: frozenset[str]
    gathered_over: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on a mesh, per device."""

    config: TrainConfig
    mesh: dict[str, int]
    parameters: list[Parameter]
    # Bytes of the trained parameters, of the rest of the state, and of the frozen parameters.
    trained_bytes: int
    optimizer_bytes: int
    frozen_bytes: int
    # Bytes of the parameters that the forward pass computes with, if they are rounded copies.
    rounded_bytes: int

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def microbatches(self) -> int:
        return self.config.optim.grad_accum_steps

    @property
    def rows(self) -> int:
        """Rows per microbatch, on all devices."""
        return self.config.data.batch_size // self.microbatches

    @property
    def tokens(self) -> int:
        """Tokens per microbatch, on one device."""
        return self.sequences * self.config.data.seq_len // self.mesh["context"]

    @property
    def sequences(self) -> int:
        """Sequences per microbatch of which one device has tokens, all or some of them."""
        return self.rows // sequence_shards(self.mesh)

    @property
    def context_bytes(self) -> int:
        """Bytes of the keys and values that a full-attention layer gathers on one device, those of whole
        sequences; 0 without a context axis."""
        if self.mesh["context"] == 1:
            return 0
        return self.sequences * self.config.data.seq_len * self.key_bytes

    @property
    def key_bytes(self) -> int:
        """Bytes of the key and value of a token in one layer, on one device."""
        return 2 * self.model.num_key_value_heads * self.model.head_dim // self.mesh["tensor"] * self.itemsize

    @property
    def itemsize(self) -> int:
        """Itemsize of activations."""
        return _compute_type(self.model).itemsize

    def trains(self, target: str) -> bool:
        """Returns True if a weight such as "down" is trained or has an adapter."""
        return self.model.lora is None or target in self.model.lora.targets

    def axis_size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh[axis] for axis in axes)

    def gathered(self, parameters: Iterable[Parameter], itemsize: int | None = None) -> int:
        """Returns the bytes of gathered parameters, in the compute dtype or with `itemsize` bytes each."""
        return sum(p.size * self.axis_size(p.gathered_over) * (itemsize or p.itemsize) for p in parameters)


def step_on(config: TrainConfig, mesh: dict[str, int]) -> Step:
    """Returns the step of a config; `mesh` (sizes by axis) overrides the config's mesh.

    Raises ValueError, with the valid sizes, if the mesh does not divide a parameter.
    """
    # Shapes depend on neither mesh nor batch size.
    size = math.lcm(config.optim.grad_accum_steps, config.grpo.group_size)
    data = dataclasses.replace(config.data, batch_size=size)
    shapes = _shapes(dataclasses.replace(config, mesh=type(config.mesh)(), data=data))
    shardings = parameter_shardings(shapes, abstract_mesh(mesh))
    state, frozen = jax.tree.map(local_bytes, shapes, shardings)
    trained = sum(jax.tree.leaves(state.params))
    rest = sum(jax.tree.leaves(state)) - trained
    parameters = _parameters(config.model, *shapes, *shardings)
    frozen_bytes = sum(jax.tree.leaves(frozen))
    return Step(config, mesh, parameters, trained, rest, frozen_bytes, _rounded_bytes(config.model, mesh))


def _rounded_bytes(model: ModelConfig, mesh: dict[str, int]) -> int:
    if not model.expert_fake_quant:
        return 0
    shapes = abstract_params(exported_config(model))
    shardings = parameter_shardings(shapes, abstract_mesh(mesh))
    return sum(jax.tree.leaves(jax.tree.map(local_bytes, shapes, shardings)))


@functools.cache
def _shapes(config: TrainConfig) -> tuple[TrainState, dict]:
    """Returns the abstract state, and the abstract frozen parameters as loaded from published weights."""
    is_trained = None if config.model.lora is None else is_adapter
    state = abstract_state(config, abstract_mesh(dict.fromkeys(AXES, 1)), is_trained)
    _, frozen = split_params(abstract_params(config.model), is_trained)
    dtype = _compute_type(config.model)
    return state, jax.tree.map(
        lambda leaf: leaf if leaf.dtype == jnp.uint8 else jax.ShapeDtypeStruct(leaf.shape, dtype), frozen
    )


def _compute_type(model: ModelConfig) -> jnp.dtype:
    """Returns the dtype of activations; "auto" is bfloat16 on all accelerators."""
    return jnp.dtype("bfloat16" if model.compute_dtype == "auto" else model.compute_dtype)


def abstract_mesh(mesh: dict[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axes_of(spec: PartitionSpec) -> frozenset[str]:
    return frozenset(axis for entry in spec for axis in spec_axes(entry))


def gathered_axes(path: Path, sharding: NamedSharding) -> tuple[str, ...]:
    """Returns the mesh axes over which a parameter is gathered for compute."""
    axes = axes_of(sharding.spec) - axes_of(compute_spec(letters_of(path) or ""))
    return tuple(axis for axis in AXES if axis in axes and sharding.mesh.shape[axis] > 1)


def local_bytes(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    """Returns the bytes of one device's shard."""
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _parameters(
    model: ModelConfig, state: TrainState, frozen: dict, of_state: TrainState, of_frozen: dict
) -> list[Parameter]:
    """Returns all parameters; the last two arguments are the shardings."""

    def parameter(is_trained, path, leaf, sharding):
        axes, gathered = axes_of(sharding.spec), gathered_axes(path, sharding)
        size = math.prod(sharding.shard_shape(leaf.shape))
        # Packed bytes are not cast.
        itemsize = 1 if leaf.dtype == jnp.uint8 else _compute_type(model).itemsize
        return Parameter(path_names(path), size, itemsize, is_trained, axes, gathered)

    found = [
        jax.tree_util.tree_map_with_path(functools.partial(parameter, is_trained), tree, placed)
        for is_trained, tree, placed in ((True, state.params, of_state.params), (False, frozen, of_frozen))
    ]
    return jax.tree.leaves(found, is_leaf=lambda leaf: isinstance(leaf, Parameter))
