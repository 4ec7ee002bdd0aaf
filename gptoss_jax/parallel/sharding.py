"""One table: where each parameter, batch and activation lies on the mesh, and where a parameter is used."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.parallel.mesh import BATCH, current_axes, divisors

# The expert axis, for a parameter that every expert's device needs: it takes part in storing it, as fsdp
# does, where it divides the dimension, and is left out where it does not.
SPARE = "expert where it divides"

# Last two names of a parameter's path -> its dimensions, without the leading one of stacked layers.
PARAMETERS = {
    ("embedding", "weight"): P(("tensor", SPARE), "fsdp"),
    ("head", "weight"): P(("tensor", SPARE), "fsdp"),
    ("attention", "q"): P("fsdp", "tensor", SPARE),
    ("attention", "k"): P("fsdp", "tensor", SPARE),
    ("attention", "v"): P("fsdp", "tensor", SPARE),
    ("attention", "out"): P("tensor", SPARE, "fsdp"),
    ("attention", "q_bias"): P("tensor", None),
    ("attention", "k_bias"): P("tensor", None),
    ("attention", "v_bias"): P("tensor", None),
    ("attention", "out_bias"): P(None),
    ("attention", "sinks"): P("tensor"),
    ("moe", "router"): P("fsdp", None),
    ("moe", "router_bias"): P(None),
    ("moe", "gate_up"): P("expert", "fsdp", None, "tensor"),
    ("moe", "gate_up_bias"): P("expert", None, "tensor"),
    ("moe", "down"): P("expert", "tensor", "fsdp"),
    ("moe", "down_bias"): P("expert", None),
    # Packed experts are split along their rows alone: 32 weights of the input axis are one group.
    ("moe", "gate_up_blocks"): P("expert", ("tensor", "fsdp"), None, None, None),
    ("moe", "gate_up_scales"): P("expert", ("tensor", "fsdp"), None, None),
    ("moe", "down_blocks"): P("expert", ("tensor", "fsdp"), None, None),
    ("moe", "down_scales"): P("expert", ("tensor", "fsdp"), None),
    ("attention_norm", "scale"): P(None),
    ("moe_norm", "scale"): P(None),
    ("final_norm", "scale"): P(None),
    # In the train state besides parameters: the random root, and muon's constants.
    ("key",): P(None),
    ("ns_coeffs",): P(None),
}

# Parameters of a block whose products are taken in the compute type: cast before they are gathered, half as
# much travels.
CAST = {"q", "k", "v", "out", "gate_up", "down", "gate_up_bias", "down_bias"}
# Where packed experts are gathered before they are unpacked: the bytes travel, not the numbers.
UNPACKED = {"gate_up": P("expert", "tensor"), "down": P("expert")}
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
        fixed = tuple(name for name in _axes(entry) if name != SPARE)
        parts = math.prod(axes[name] for name in fixed)
        if size % parts:
            asked = " times ".join(f"mesh.{name}" for name in fixed)
            named = ".".join(path_names(path)[-2:])
            would_do = ", ".join(map(str, divisors(size, math.prod(axes.values()))))
            raise ValueError(
                f"{asked} is {parts}: must divide {size}, a size of {named}; {would_do} would do"
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, stored: P, used: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, stored), used)


def _gather_backward(stored, used, _, g):
    # Straight from the devices' parts of the sum to its shards: a reduce-scatter, not an all-reduce.
    return (jax.lax.with_sharding_constraint(g, stored),)


_gather.defvjp(lambda x, stored, used: (_gather(x, stored, used), None), _gather_backward)


def gather_as(path, x: jax.Array) -> jax.Array:
    """A parameter as it is used, on the mesh there is."""
    return _gather(x, parameter_spec(path, x.shape, current_axes()), used_spec(path, x.ndim))


def gather(tree, dtype: jnp.dtype):
    """The parameters of a part of the model as they are used, in a tree like theirs: FSDP's gather.

    The matrices are cast to `dtype` first. Gradients come back as shards. Without a mesh the tree is returned
    as it is, and packed experts always are: they are gathered where they are unpacked.
    """
    axes = current_axes()
    if not axes:
        return tree

    def one(path, x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return x
        x = x.astype(dtype) if path_names(path)[-1] in CAST else x
        return gather_as(path, x)

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Holds an activation to its place on the mesh; does nothing where there is no mesh."""
    return jax.lax.with_sharding_constraint(x, spec) if current_axes() else x


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's [B, T] arrays."""
    return NamedSharding(mesh, BATCH_BT)


def dtype_bytes(tree) -> int:
    """Bytes of all arrays of a tree, abstract or real, over all devices."""
    return sum(jnp.dtype(leaf.dtype).itemsize * leaf.size for leaf in jax.tree.leaves(tree))
