"""Linear layers with sharded weights: tensor parallelism and FSDP.

Linear layers are einsums with sharding constraints. Where the compiler would communicate too much (gradients
of weights, vocabulary, experts) or cannot shard (Pallas kernels), `shard_map` makes the computation of each
device explicit.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.cpu import decode, grouped
from gptoss_jax.kernels.layer_view import LayerView, as_view, cast_layer, read
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.rules import HEADS_BTNH, ROWS, compute_spec, constrain, spec_axes, storage_spec

# Checkpoint name by which rematerialization policies can save the results of `sharded_einsum`.
LINEAR_OUTPUT = "linear_output"

Weight = jax.Array | LayerView
Result = TypeVar("Result")


@overload
def sharded_einsum(
    equation: str, x: jax.Array, weights: Weight, result_type: Any = None, name: str | None = LINEAR_OUTPUT
) -> jax.Array: ...
@overload
def sharded_einsum(
    equation: str,
    x: jax.Array,
    weights: Sequence[Weight],
    result_type: Any = None,
    name: str | None = LINEAR_OUTPUT,
) -> list[jax.Array]: ...
def sharded_einsum(
    equation: str,
    x: jax.Array,
    weights: Weight | Sequence[Weight],
    result_type: jnp.dtype | None = None,
    name: str | None = LINEAR_OUTPUT,
) -> jax.Array | list[jax.Array]:
    """Computes `einsum(equation, x, weight)` for one or several sharded weights.

    The letters of the equation determine the sharding of its arrays (`parallel/rules.py`): the batch axes
    split the first dimension of `x` and of the result. Dimensions that the tensor axis splits stay split, or
    are summed over devices if the equation contracts them. The compiler inserts FSDP's all-gathers and
    reduce-scatters from sharding constraints.

    Example: `q, k = sharded_einsum("BTD,DNH->BTNH", x_BTD, (q_DNH, k_DKH))`.

    Args:
      x: the input; weights are rounded to its dtype.
      weights: one or several weights for the same equation. LayerViews are read in place if a kernel supports
        it.
      result_type: dtype of the result; by default, that of `x`.
      name: checkpoint name by which rematerialization can save the result; None recomputes it.

    Returns the result for each weight: a list for a sequence of weights, otherwise one array.
    """
    # Chosen here for both passes: the backward pass is traced outside of `selection.using`.
    rules = _Rules(equation, result_type, name, grouped.supports_einsum(equation, x, result_type))
    if isinstance(weights, list | tuple):
        return _sharded_einsums(rules, x, tuple(weights))
    return _sharded_einsums(rules, x, (weights,))[0]


class _Rules(NamedTuple):
    """What `sharded_einsum` computes besides arrays, and whether by the grouped matmul's kernel on CPU."""

    equation: str
    result_type: jnp.dtype | None
    name: str | None
    uses_grouped: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sharded_einsums(rules: _Rules, x: jax.Array, weights: tuple[Weight, ...]) -> list[jax.Array]:
    equation, result_type, _, uses_grouped = rules
    results: list[jax.Array] = []
    x_letters, letters, _ = equation.replace("->", ",").split(",")
    for weight in weights:
        assert_shapes(f"{x_letters} {letters}", x, weight)
    weights = _readable(weights, x.dtype)
    if decode.supports_einsum(equation, x, result_type):
        results = decode.einsum(equation, x, [as_view(weight) for weight in weights], result_type)
    elif uses_grouped:
        results = [grouped.einsum(equation, x, as_view(weight)) for weight in weights]
    else:
        x_spec, y_spec = activation_specs(equation)
        x = constrain(x, x_spec)
        for weight in weights:
            gathered = gathered_weight(letters, read(weight), x.dtype)
            y = jnp.einsum(equation, x, gathered, precision="highest", preferred_element_type=result_type)
            results.append(constrain(y, y_spec))
    return results


def _einsum_forward(
    rules: _Rules, x: jax.Array, weights: tuple[Weight, ...]
) -> tuple[list[jax.Array], tuple[jax.Array, tuple[Weight, ...]]]:
    results = _sharded_einsums(rules, x, weights)
    if rules.name is not None:
        results = [checkpoint_name(y, rules.name) for y in results]
    return results, (x, weights)


def _einsum_backward(
    rules: _Rules, residuals: tuple[jax.Array, tuple[jax.Array, ...]], gradients: list[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Gathers the weights again instead of saving them. In XLA, the gradient of a weight is computed as
    x^T g; with the other order, XLA on CPU would transpose g."""
    x, weights = residuals
    equation = rules.equation
    if rules.uses_grouped:
        return _grouped_backward(equation, x, weights, gradients)
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")
    x_spec, y_spec = activation_specs(equation)
    axes = current_axes()

    def backward(equation, a, b, dtype):
        # If the result is wider than the operands, so is its gradient.
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(equation, a, b, precision="highest").astype(x.dtype)

    d_xs, d_weights = [], []
    for weight, g in zip(weights, gradients, strict=True):
        stored = current_storage_spec(letters, weight.shape)

        def weight_gradient(x, g, stored=stored):
            d_weight = backward(f"{x_letters},{y_letters}->{letters}", x, g, g.dtype)
            return reduce_gradient(d_weight, stored, compute_spec(letters)) if axes else d_weight

        if axes:
            # From sharding constraints, the compiler would make an all-reduce.
            weight_gradient = jax.shard_map(
                weight_gradient, in_specs=(x_spec, y_spec), out_specs=stored, check_vma=False
            )
        d_weights.append(weight_gradient(x, g).astype(weight.dtype))
        weight = gathered_weight(letters, weight, x.dtype)
        d_xs.append(backward(f"{y_letters},{letters}->{x_letters}", g, weight, g.dtype))
    d_x = constrain(functools.reduce(jnp.add, reversed(d_xs)), x_spec)
    return d_x, tuple(d_weights)


def _grouped_backward(
    equation: str, x: jax.Array, weights: tuple[jax.Array, ...], gradients: list[jax.Array]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return grouped.einsum(equation, x, as_view(*_readable((weight,), x.dtype)))

    pairs = [jax.vjp(product, x, weight)[1](g) for weight, g in zip(weights, gradients, strict=True)]
    d_xs, d_weights = zip(*pairs, strict=True)
    return functools.reduce(jnp.add, reversed(d_xs)), d_weights


def _readable(weights: tuple[Weight, ...], dtype: jnp.dtype) -> tuple[Weight, ...]:
    """Returns weights that kernels can read: in float32 or bfloat16, otherwise all cast to `dtype`, because a
    kernel reads the same layer of every stack."""
    if all(weight.dtype in (jnp.float32, jnp.bfloat16) for weight in weights):
        return weights
    return tuple(read(weight).astype(dtype) for weight in weights)


_sharded_einsums.defvjp(_einsum_forward, _einsum_backward)


def activation_specs(equation: str) -> tuple[P, P]:
    """Returns the specs of an equation's activations: its first operand and its result."""
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")
    split = dict(zip(letters, compute_spec(letters), strict=True)) | {x_letters[0]: BATCH}
    return P(*map(split.get, x_letters)), P(*map(split.get, y_letters))


def current_storage_spec(letters: str, shape: tuple[int, ...]) -> P:
    """Returns the storage spec of a parameter on the current mesh."""
    axes = current_axes()
    return storage_spec(letters, shape, axes, letters) if axes else P()


def gathered_weight(letters: str, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Casts a weight in its storage sharding, then all-gathers it over the fsdp and expert axes."""
    weight = constrain(cast_layer(weight, dtype), current_storage_spec(letters, weight.shape))
    return constrain(weight, compute_spec(letters))


def gathered_dimensions(stored: P, used: P) -> list[tuple[int, tuple[str, ...]]]:
    """Returns the dimensions that are gathered for use, each with the axes that split it."""
    sizes, found = current_axes(), []
    for dimension, (before, after) in enumerate(zip(stored, used, strict=True)):
        axes = tuple(axis for axis in spec_axes(before) if axis not in spec_axes(after) and sizes[axis] > 1)
        found += [(dimension, axes)] if axes else []
    return found


def gather_parameter(x: jax.Array, stored: P, used: P) -> jax.Array:
    """Inside `shard_map`: all-gathers a parameter over the fsdp axis and, unless it has experts, the expert
    axis. The gradient is reduce-scattered."""
    for dimension, axes in gathered_dimensions(stored, used):
        x = _all_gather(x, axes, dimension)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)


_all_gather.defvjp(
    lambda x, axes, dimension: (_all_gather(x, axes, dimension), None),
    lambda axes, dimension, _, g: (_scatter_gradient(g, axes, dimension),),
)


def _scatter_gradient(g: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside `shard_map`: the transpose of `_all_gather`. Gate and up, [E, D, P, F], are scattered one after
    the other."""
    if g.ndim < 4 or dimension > 1:
        return reduce_scatter(g, axes, dimension)
    parts = [reduce_scatter(part, axes, dimension) for part in jnp.unstack(g, axis=2)]
    return jnp.stack(parts, axis=2)


def reduce_gradient(g: jax.Array, stored: P, used: P) -> jax.Array:
    """Inside `shard_map`: the transpose of `gather_parameter`, summed over all axes that split the batch."""
    for dimension, axes in gathered_dimensions(stored, used):
        g = reduce_scatter(g, axes, dimension)
    return sum_over_replicas(g, stored)


def sum_over_replicas(g: jax.Array, stored: P) -> jax.Array:
    """Inside `shard_map`: sums a gradient over the axes that split the batch but not the parameter."""
    sizes, split = current_axes(), {axis for entry in stored for axis in spec_axes(entry)}
    return jax.lax.psum(g, tuple(axis for axis in BATCH if axis not in split and sizes[axis] > 1))


def reduce_scatter(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Inside `shard_map`: sums over `axes`, and returns the device's part of a dimension.

    Equal to `jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)`, which the TPU compiler
    turns into an all-reduce of twice the bytes if the parts are not whole tiles of memory, or the devices are
    all of a slice. Therefore scatters whole tiles, and over one factor of the devices after the other.
    """
    if dimension == x.ndim - 1 and x.ndim > 1:
        # TPUs pad the last dimension to whole lanes: with a small part of it last in memory, a stack of
        # gradients would be padded too.
        return reduce_scatter(x.swapaxes(-1, -2), axes, dimension - 1).swapaxes(-1, -2)
    steps, sizes = [], []
    for axis in axes:
        factors = _scatter_steps(axis)
        steps += factors
        sizes += [devices for _, _, devices in factors]
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    part = (*before, x.shape[dimension] // math.prod(sizes), *after)
    x = x.reshape(*before, *sizes, *part[dimension:])
    # The last factor is scattered first, and must therefore be the outermost.
    x = jnp.transpose(
        x,
        (
            *range(dimension + len(sizes) - 1, dimension - 1, -1),
            *range(dimension),
            *range(dimension + len(sizes), x.ndim),
        ),
    )
    tile = (8, 128) if math.prod(part) % (8 * 128) == 0 else (math.prod(part),)
    x = x.reshape(-1, *tile)
    for axis, groups, _ in reversed(steps):
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True, axis_index_groups=groups)
    return x.reshape(part)


def _scatter_steps(axis: str) -> list[tuple[str, list[list[int]] | None, int]]:
    """Returns (axis, groups of devices or None for all, devices in a group) for each factor of an axis, major
    first: two if it may have all devices of a slice, otherwise one."""
    sizes = current_axes()
    # The data axis may join slices.
    devices, most = sizes[axis], math.prod(sizes.values()) // sizes["data"]
    if devices < most or devices % 2 or devices == 2:
        return [(axis, None, devices)]
    half = devices // 2
    pairs = [[i, i + half] for i in range(half)]
    halves = [list(range(half)), list(range(half, devices))]
    return [(axis, pairs, 2), (axis, halves, half)]


@jax.custom_vjp
def tensor_psum(x: jax.Array) -> jax.Array:
    """Inside `shard_map` without vma checks: sums over the tensor axis; the result is replicated on it.

    shard_map divides the cotangent of a replicated result by the axis size, but each summand needs the full
    cotangent: the backward pass multiplies by the axis size, which saves a second psum.
    """
    return jax.lax.psum(x, "tensor")


tensor_psum.defvjp(lambda x: (tensor_psum(x), None), lambda _, g: (g * jax.lax.axis_size("tensor"),))


def tensor_all_gather(y_RF: jax.Array) -> jax.Array:
    """Inside `shard_map`: all-gathers outputs over the tensor axis."""
    is_split = current_axes().get("tensor", 1) > 1
    return jax.lax.all_gather(y_RF, "tensor", axis=1, tiled=True) if is_split else y_RF


def shard_map_batch(function: Callable[..., Result], *arrays: jax.Array) -> Result:
    """Maps `function` over the batch axes: each device applies it to its local rows."""
    if not current_axes():
        return function(*arrays)
    return jax.shard_map(function, in_specs=ROWS, out_specs=ROWS, check_vma=False)(*arrays)


def shard_map_heads(
    function: Callable,
    heads: tuple[jax.Array, ...],
    sinks_N: jax.Array | None,
    key: jax.Array | None,
    *rows_BT: jax.Array,
) -> jax.Array:
    """Maps `function(*heads, sinks, key, *rows)` over the batch axes and the tensor axis, which splits the
    heads: axis 2 of `heads` and of the result, [B, T, N or K, H]. Each device has a different random key."""
    if not current_axes():
        return function(*heads, sinks_N, key, *rows_BT)

    def one_device(heads, sinks_N, key_data, rows):
        key = None
        if key_data is not None:
            device = jax.lax.axis_index((*BATCH, "tensor"))
            key = jax.random.fold_in(jax.random.wrap_key_data(key_data), device)
        return function(*heads, sinks_N, key, *rows)

    key_data = None if key is None else jax.random.key_data(key)
    specs = (HEADS_BTNH, compute_spec("N"), P(), ROWS)
    mapped = jax.shard_map(one_device, in_specs=specs, out_specs=HEADS_BTNH, check_vma=False)
    return mapped(heads, sinks_N, key_data, rows_BT)
