"""Linear layers and embeddings whose weights are sharded: tensor parallelism and FSDP.

Linear layers are einsums with sharding constraints. Where the compiler would shard badly (embeddings, the
loss, experts) or cannot (Pallas kernels), `shard_map` says what every device does.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.cpu import decode
from gptoss_jax.kernels.layer_view import LayerView, as_view, read
from gptoss_jax.kernels.shapes import assert_shapes
from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.rules import compute_spec, constrain, spec_axes, storage_spec

# The name by which rematerialization can keep the results of `sharded_einsum`.
LINEAR_OUTPUT = "linear_output"


def sharded_einsum(
    equation: str,
    x: jax.Array,
    weights: jax.Array | LayerView | Sequence[jax.Array | LayerView],
    result_type: jnp.dtype | None = None,
):
    """Computes `einsum(equation, x, weight)` for one weight or several, with weights that are sharded.

    The letters of the equation say how its arrays are sharded (`parallel/rules.py`): the batch axes split the
    first dimension of `x` and of the result; what the tensor axis splits stays split, or is summed over
    devices where the equation sums over it. Example: `q, k = sharded_einsum("BTD,DNH->BTNH", x_BTD, (q_DNH,
    k_DKH))`.

    Args:
      x: multiplied in its own type, to which weights are cast.
      weights: of the same equation. Several share one gather of `x`'s gradient.
      result_type: default the type of `x`.

    Returns the result of each weight: a list for a sequence of weights, else one array.
    """
    several = isinstance(weights, list | tuple)
    weights = weights if several else [weights]
    x_letters, letters, _ = equation.replace("->", ",").split(",")
    for weight in weights:
        assert_shapes(f"{x_letters} {letters}", x, weight)
    are_views = all(isinstance(weight, LayerView) and weight.dtype == x.dtype for weight in weights)
    if are_views and decode.supports_einsum(equation, x, result_type):
        results = decode.einsum(equation, x, weights)
    elif not current_axes():
        results = [_einsum(equation, x, read(w).astype(x.dtype), result_type) for w in weights]
    else:
        results = _einsum_on_mesh(equation, x, list(map(read, weights)), result_type)
    results = [checkpoint_name(y, LINEAR_OUTPUT) for y in results]
    return results if several else results[0]


def _einsum_on_mesh(equation, x, weights, result_type):
    """Plain sharding constraints: the compiler inserts FSDP's gathers and reduce-scatters, and the sums over
    the tensor axis, on TPU the same ones as a hand-written shard_map."""
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")
    used = compute_spec(letters)
    split = dict(zip(letters, used, strict=True)) | {x_letters[0]: BATCH}
    x_spec, y_spec = (P(*map(split.get, letters)) for letters in (x_letters, y_letters))

    def multiply(x, *weights):
        x, results = constrain(x, x_spec), []
        for weight in weights:
            stored = storage_spec(letters, weight.shape, current_axes(), letters)
            # Cast where it is stored, then gathered.
            weight = constrain(constrain(weight.astype(x.dtype), stored), used)
            results.append(constrain(_einsum(equation, x, weight, result_type), y_spec))
        return results

    # The gradient gathers the weights again instead of keeping them.
    return jax.checkpoint(multiply, prevent_cse=False)(x, *weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation: str, x: jax.Array, weight: jax.Array, result_type) -> jax.Array:
    """`einsum` whose weight gradient is computed as x^T g: the other order makes XLA for CPU transpose g."""
    if decode.supports_einsum(equation, x, result_type):
        return decode.einsum(equation, x, [as_view(weight)])[0]
    return jnp.einsum(equation, x, weight, precision="highest", preferred_element_type=result_type)


def _einsum_bwd(equation, result_type, residuals, g):
    x, weight = residuals
    x_letters, letters, y_letters = equation.replace("->", ",").split(",")

    def backward(equation, a, b, dtype):
        # A result wider than the operands has a gradient as wide.
        a, b = (operand.astype(g.dtype) for operand in (a, b))
        return jnp.einsum(equation, a, b, precision="highest").astype(dtype)

    d_weight = backward(f"{x_letters},{y_letters}->{letters}", x, g, weight.dtype)
    return backward(f"{y_letters},{letters}->{x_letters}", g, weight, x.dtype), d_weight


_einsum.defvjp(
    lambda equation, x, weight, result_type: (_einsum(equation, x, weight, result_type), (x, weight)),
    _einsum_bwd,
)


def embedding_lookup(weight_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns `weight_VD[tokens_BT]`, [B, T, D], sharded like a batch.

    Each device looks up its own rows, and sums only their gradient. Left to itself, the compiler shards rows
    and batch over the same axes, and moves every activation to do so.
    """
    assert_shapes("VD BT", weight_VD, tokens_BT)
    axes = current_axes()
    if not axes:
        return weight_VD[tokens_BT]
    stored, used = storage_spec("VD", weight_VD.shape, axes, "embedding.weight"), compute_spec("VD")

    def one_device(weight_VD, tokens_BT):
        weight_VD = fsdp_all_gather(weight_VD, stored, used)
        if axes["tensor"] == 1:
            return weight_VD[tokens_BT]
        index_BT, is_local_BT = local_vocab_index(tokens_BT, weight_VD.shape[0])
        return tensor_psum(jnp.where(is_local_BT[..., None], weight_VD[index_BT], 0))

    specs = {"in_specs": (stored, P(BATCH)), "out_specs": P(BATCH)}
    return jax.shard_map(one_device, **specs, check_vma=False)(weight_VD, tokens_BT)


def local_vocab_index(tokens_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`: the index of tokens in this device's `size` rows of the vocabulary, and whether
    they are there (index 0 where not)."""
    index_BT = tokens_BT - jax.lax.axis_index("tensor") * size
    is_local_BT = (index_BT >= 0) & (index_BT < size)
    return jnp.where(is_local_BT, index_BT, 0), is_local_BT


def gathered_dimensions(stored: P, used: P) -> list[tuple[int, tuple[str, ...]]]:
    """Returns the dimensions that are gathered before use, each with the axes that split it."""
    sizes, found = current_axes(), []
    for dimension, (before, after) in enumerate(zip(stored, used, strict=True)):
        axes = tuple(axis for axis in spec_axes(before) if axis not in spec_axes(after) and sizes[axis] > 1)
        found += [(dimension, axes)] if axes else []
    return found


def fsdp_all_gather(x: jax.Array, stored: P, used: P) -> jax.Array:
    """Inside `shard_map`: gathers a parameter's shard for use. Its gradient is reduce-scattered."""
    for dimension, axes in gathered_dimensions(stored, used):
        x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return x


def fsdp_reduce_scatter(g: jax.Array, stored: P, used: P) -> jax.Array:
    """Inside `shard_map`: the transpose of `fsdp_all_gather`, summed over all axes that split the batch."""
    for dimension, axes in gathered_dimensions(stored, used):
        g = jax.lax.psum_scatter(g, axes, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(g, _batch_axes_not_in(stored))


def _batch_axes_not_in(spec: P) -> tuple[str, ...]:
    split = {axis for entry in spec for axis in spec_axes(entry)}
    return tuple(axis for axis in BATCH if axis not in split)


@jax.custom_vjp
def tensor_psum(x: jax.Array) -> jax.Array:
    """Inside `shard_map` without vma checks: the sum over the tensor axis of a result replicated on it.

    shard_map divides the cotangent of a replicated result by the axis size, but each summand needs all of it,
    so scale by the size instead of a second psum.
    """
    return jax.lax.psum(x, "tensor")


tensor_psum.defvjp(lambda x: (tensor_psum(x), None), lambda _, g: (g * jax.lax.axis_size("tensor"),))


def tensor_all_gather(y_RF: jax.Array) -> jax.Array:
    """Inside `shard_map`: gathers the outputs that the devices of the tensor axis have parts of."""
    is_split = current_axes().get("tensor", 1) > 1
    return jax.lax.all_gather(y_RF, "tensor", axis=1, tiled=True) if is_split else y_RF


def shard_map_batch(function: Callable, *arrays: jax.Array):
    """Maps `function` over the batch axes: every device applies it to its local rows."""
    if not current_axes():
        return function(*arrays)
    return jax.shard_map(function, in_specs=P(BATCH), out_specs=P(BATCH), check_vma=False)(*arrays)


def shard_map_heads(
    function: Callable,
    heads: tuple[jax.Array, ...],
    sinks_N: jax.Array | None,
    key: jax.Array | None,
    *rows_BT: jax.Array,
) -> jax.Array:
    """Maps `function(*heads, sinks, key, *rows)` over the batch axes and the tensor axis, which splits the
    heads: axis 2 of `heads` and of the result, [B, T, N or K, H]. Each device has its own random key."""
    if not current_axes():
        return function(*heads, sinks_N, key, *rows_BT)

    def one_device(heads, sinks_N, key_data, rows):
        key = None
        if key_data is not None:
            device = jax.lax.axis_index((*BATCH, "tensor"))
            key = jax.random.fold_in(jax.random.wrap_key_data(key_data), device)
        return function(*heads, sinks_N, key, *rows)

    spec = P(BATCH, None, "tensor", None)
    key_data = None if key is None else jax.random.key_data(key)
    return jax.shard_map(
        one_device, in_specs=(spec, P("tensor"), P(), P(BATCH)), out_specs=spec, check_vma=False
    )(heads, sinks_N, key_data, rows_BT)
