"""One table: where each parameter, batch and activation lies on the mesh, and where a parameter is used."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.kernels.cpu import decode
from gptoss_jax.kernels.stack import layer_of
from gptoss_jax.parallel.mesh import AXES, BATCH, current_axes, divisors

# The expert axis, for a parameter that every expert's device needs: it takes part in storing it, as fsdp
# does, where it divides the dimension, and is left out where it does not.
SPARE = "expert where it divides"
# Of a dimension in which two and two belong together: no pair is split.
PAIRS = "pairs stay together"

Path = tuple[str, str]

# What rematerialisation calls the results of `products`.
PRODUCT = "product"

# Last two names of a parameter's path -> its dimensions, without the leading one of stacked layers.
PARAMETERS = {
    ("embedding", "weight"): P(("tensor", SPARE), "fsdp"),
    ("head", "weight"): P(("tensor", SPARE), "fsdp"),
    ("attention", "q"): P(("fsdp", SPARE), "tensor", None),
    ("attention", "k"): P(("fsdp", SPARE), "tensor", None),
    ("attention", "v"): P(("fsdp", SPARE), "tensor", None),
    ("attention", "out"): P("tensor", None, ("fsdp", SPARE)),
    ("attention", "q_bias"): P("tensor", None),
    ("attention", "k_bias"): P("tensor", None),
    ("attention", "v_bias"): P("tensor", None),
    ("attention", "out_bias"): P(None),
    ("attention", "sinks"): P("tensor"),
    ("moe", "router"): P(("fsdp", SPARE), None),
    ("moe", "router_bias"): P(None),
    ("moe", "gate_up"): P("expert", "fsdp", None, "tensor"),
    ("moe", "gate_up_bias"): P("expert", None, "tensor"),
    ("moe", "down"): P("expert", "tensor", "fsdp"),
    ("moe", "down_bias"): P("expert", None),
    # Packed experts are split along their rows alone: 32 weights of the input axis are one group. The rows of
    # gate and up take turns.
    ("moe", "gate_up_blocks"): P("expert", ("tensor", "fsdp", PAIRS), None, None),
    ("moe", "gate_up_scales"): P("expert", ("tensor", "fsdp", PAIRS), None),
    ("moe", "down_blocks"): P("expert", ("tensor", "fsdp"), None, None),
    ("moe", "down_scales"): P("expert", ("tensor", "fsdp"), None),
    ("attention_norm", "scale"): P(None),
    ("moe_norm", "scale"): P(None),
    ("final_norm", "scale"): P(None),
    # In the train state besides parameters: the random root, and muon's constants.
    ("key",): P(None),
    ("ns_coeffs",): P(None),
}

BATCH_BT = P(BATCH, None)
HIDDEN_BTD = P(BATCH, None, None)


def path_names(path) -> tuple[str, ...]:
    """The names along a path of `jax.tree_util`, a module's Variables left out."""
    names = (str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    return tuple(name for name in names if name != "value")


def _axes(entry) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _table_spec(path, ndim: int) -> P:
    """A parameter's line of the table, filled up for leading dimensions. Raises KeyError without one."""
    names = path_names(path)
    spec = PARAMETERS.get(names[-2:]) or PARAMETERS[names[-1:]]
    return P(*(None,) * (ndim - len(spec)), *spec)


def parameter_spec(path, shape: tuple[int, ...], axes: Mapping[str, int]) -> P:
    """Where a parameter lies; anything in an optimiser's state lies where the parameter of that path does.

    Args:
      axes: the sizes of the mesh's axes.

    Raises KeyError for a parameter that the table does not know, and ValueError, naming it and the sizes that
    would do, when an axis does not divide its dimension.
    """
    if not shape:
        return P()
    entries = []
    for size, entry in zip(shape, _table_spec(path, len(shape)), strict=True):
        fixed = tuple(name for name in _axes(entry) if name in AXES)
        parts = math.prod(axes[name] for name in fixed)
        what = "a size"
        if PAIRS in _axes(entry):
            size, what = size // 2, "the pairs"
        if size % parts:
            asked = " times ".join(f"mesh.{name}" for name in fixed)
            named = ".".join(path_names(path)[-2:])
            would_do = ", ".join(map(str, divisors(size, math.prod(axes.values()))))
            raise ValueError(
                f"{asked} is {parts}: must divide {size}, {what} of {named}; {would_do} would do"
            )
        if SPARE in _axes(entry) and size % (parts * axes["expert"]) == 0:
            fixed += ("expert",)
        entries.append(fixed[0] if len(fixed) == 1 else fixed or None)
    return P(*entries)


def used_spec(path, ndim: int) -> P:
    """Where a parameter lies while it is used: gathered over fsdp, and over the expert axis unless that holds
    different experts."""
    expert = (
        () if SPARE in (name for entry in _table_spec(path, ndim) for name in _axes(entry)) else ("expert",)
    )
    kept = {"tensor", *expert}
    entries = [tuple(n for n in _axes(entry) if n in kept) for entry in _table_spec(path, ndim)]
    return P(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def parameter_shardings(tree, mesh: Mesh):
    """The sharding of every leaf of a parameter tree or an optimiser's state over it.

    Raises ValueError as `parameter_spec` does.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(path, leaf.shape, dict(mesh.shape))), tree
    )


def gathers(stored: P, used: P) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions of a parameter that are gathered before it is used, and the axes they are split over."""
    sizes, found = current_axes(), []
    for dimension, (before, after) in enumerate(zip(stored, used, strict=True)):
        names = tuple(name for name in _axes(before) if name not in _axes(after) and sizes[name] > 1)
        found += [(dimension, names)] if names else []
    return found


def gathered(x: jax.Array, stored: P, used: P) -> jax.Array:
    """Inside of `shard_map`, a parameter's shard as it is used: FSDP's gather.

    Its gradient comes back as a shard: each device gets the sum of its part alone (reduce-scatter).
    """
    for dimension, names in gathers(stored, used):
        x = jax.lax.all_gather(x, names, axis=dimension, tiled=True)
    return x


def scattered(g: jax.Array, stored: P, used: P) -> jax.Array:
    """A gradient as it is stored: the transpose of `gathered`, summed over all axes that split the batch."""
    for dimension, names in gathers(stored, used):
        g = jax.lax.psum_scatter(g, names, scatter_dimension=dimension, tiled=True)
    held = {name for entry in stored for name in _axes(entry)}
    return jax.lax.psum(g, tuple(name for name in BATCH if name not in held))


def by_device(function: Callable, *arrays: jax.Array):
    """`function` of each device's own rows, those of arrays and results alike that the batch's axes split."""
    if not current_axes():
        return function(*arrays)
    return jax.shard_map(function, in_specs=P(BATCH), out_specs=P(BATCH), check_vma=False)(*arrays)


def by_head(
    function: Callable,
    heads: tuple[jax.Array, ...],
    sinks_N: jax.Array | None,
    key: jax.Array | None,
    *rows_BT,
) -> jax.Array:
    """`function(*heads, sinks, key, *rows)` of each device's own rows and heads.

    Heads are split on axis 2 of `heads` and of the result, [B, T, N or K, H]. Each device has a random key of
    its own.
    """
    if not current_axes():
        return function(*heads, sinks_N, key, *rows_BT)

    def one_device(heads, sinks_N, key_data, rows):
        key = None
        if key_data is not None:
            place = jax.lax.axis_index((*BATCH, "tensor"))
            key = jax.random.fold_in(jax.random.wrap_key_data(key_data), place)
        return function(*heads, sinks_N, key, *rows)

    spec = P(BATCH, None, "tensor", None)
    key_data = None if key is None else jax.random.key_data(key)
    return jax.shard_map(
        one_device, in_specs=(spec, P("tensor"), P(), P(BATCH)), out_specs=spec, check_vma=False
    )(heads, sinks_N, key_data, rows_BT)


@jax.custom_vjp
def sum_over_tensor(x: jax.Array) -> jax.Array:
    """Inside of `shard_map`, the sum over the tensor axis of a result that is the same on all its devices.

    What comes back to the one result is shared out evenly between its copies; each part of the sum is due
    all of it. That takes no second sum over the devices, as the transpose of `psum` would.
    """
    return jax.lax.psum(x, "tensor")


sum_over_tensor.defvjp(lambda x: (sum_over_tensor(x), None), lambda _, g: (g * jax.lax.axis_size("tensor"),))


def products(
    equation: str, x: jax.Array, weights: Mapping[Path, jax.Array], result_type: jnp.dtype | None = None
) -> list[jax.Array]:
    """`einsum(equation, x, weight)` with weights that are stored in shards, in the type of `x`.

    Each device gathers the weights for its part of the batch, cast first, and gathers them again for the
    gradient rather than keep them. What the tensor axis splits stays split, or is added up where it is summed
    over; so is the gradient in `x`, once for all weights.

    Args:
      equation: letters as everywhere; the first of `x` and of the result is what the batch's axes split.
      weights: by their line of the table.
      result_type: default that of `x`.
    """
    results = _products(equation, x, weights, result_type)
    return [checkpoint_name(y, PRODUCT) for y in results]


def _products(equation, x, weights, result_type):
    axes = current_axes()
    if result_type in (None, x.dtype) and decode.suits("decode_matmul", _rows(equation, x), x.dtype):
        return decode.products(equation, x, [layer_of(weight.astype(x.dtype)) for weight in weights.values()])
    weights = {path: jnp.asarray(weight) for path, weight in weights.items()}
    if not axes:
        return [_einsum(equation, x, weight.astype(x.dtype), result_type) for weight in weights.values()]
    keys = {path: tuple(map(jax.tree_util.DictKey, path)) for path in weights}
    stored = [parameter_spec(keys[path], weight.shape, axes) for path, weight in weights.items()]
    used = [used_spec(keys[path], weight.ndim) for path, weight in weights.items()]
    (x_letters, weight_letters), (result_letters,) = (equation.partition("->")[i].split(",") for i in (0, 2))
    split = {letter: entry for letter, entry in zip(weight_letters, used[0], strict=True) if entry}
    summed = any(letter not in result_letters for letter in split)

    def one_device(x, *shards):
        if split and not summed:
            x = jax.lax.pcast(x, "tensor", to="varying")
        results = []
        for shard, *specs in zip(shards, stored, used, strict=True):
            weight = gathered(shard.astype(x.dtype), *specs)
            # Its gradient is summed over the devices that have the same part of it.
            held = {name for entry in specs[0] for name in _axes(entry)}
            copies = tuple(name for name in BATCH if name not in held)
            weight = jax.lax.pcast(weight, copies, to="varying") if copies else weight
            y = _einsum(equation, x, weight, result_type)
            results.append(jax.lax.psum(y, "tensor") if summed else y)
        return results

    place = split | {x_letters[0]: BATCH}
    return jax.shard_map(
        jax.checkpoint(one_device, prevent_cse=False) if any(map(gathers, stored, used)) else one_device,
        in_specs=(P(*map(place.get, x_letters)), *stored),
        out_specs=P(*map(place.get, result_letters)),
    )(x, *weights.values())


def _rows(equation: str, x: jax.Array) -> int:
    """How many vectors of `x` are multiplied."""
    x_letters, y_letters = equation.split(",")[0], equation.split("->")[1]
    return math.prod(size for letter, size in zip(x_letters, x.shape, strict=True) if letter in y_letters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation: str, x: jax.Array, weight: jax.Array, result_type) -> jax.Array:
    """`einsum`, whose gradient in the weight is the product x^T g, in this order.

    In the other one, which `einsum` takes, a compiler has to turn g, and XLA for CPU works g out number by
    number to do so.
    """
    return jnp.einsum(equation, x, weight, precision="highest", preferred_element_type=result_type)


def _einsum_bwd(equation, result_type, kept, g):
    x, weight = kept
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")

    def backward(equation, a, b, dtype):
        # Where the result is wider than the operands, so is its gradient.
        a, b = (operand.astype(g.dtype) for operand in (a, b))
        return jnp.einsum(equation, a, b, precision="highest").astype(dtype)

    d_weight = backward(f"{x_letters},{y_letters}->{weight_letters}", x, g, weight.dtype)
    return backward(f"{y_letters},{weight_letters}->{x_letters}", g, weight, x.dtype), d_weight


_einsum.defvjp(
    lambda equation, x, weight, result_type: (_einsum(equation, x, weight, result_type), (x, weight)),
    _einsum_bwd,
)


def product(
    path: Path, equation: str, x: jax.Array, weight: jax.Array, result_type: jnp.dtype | None = None
) -> jax.Array:
    """`products` for one weight."""
    return products(equation, x, {path: weight}, result_type)[0]


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Holds an activation to its place on the mesh; does nothing where there is no mesh."""
    return jax.lax.with_sharding_constraint(x, spec) if current_axes() else x


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's [B, T] arrays."""
    return NamedSharding(mesh, BATCH_BT)


def dtype_bytes(tree) -> int:
    """Bytes of all arrays of a tree, abstract or real, over all devices."""
    return sum(jnp.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(tree))
