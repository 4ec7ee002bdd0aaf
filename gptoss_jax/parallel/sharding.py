"""One table: where each parameter, batch and activation lies on the mesh."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.parallel.mesh import BATCH, current_axes

# Last two names of a parameter's path -> its dimensions, without the leading one of stacked layers.
PARAMETERS = {
    ("embedding", "weight"): P("tensor", "fsdp"),
    ("head", "weight"): P("tensor", "fsdp"),
    ("attention", "q"): P("fsdp", "tensor", None),
    ("attention", "k"): P("fsdp", "tensor", None),
    ("attention", "v"): P("fsdp", "tensor", None),
    ("attention", "out"): P("tensor", None, "fsdp"),
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

# Where packed experts are gathered before they are unpacked: the bytes travel, not the numbers.
UNPACKED = {"gate_up": P("expert", "tensor"), "down": P("expert")}
BATCH_BT = P(BATCH, None)
HIDDEN_BTD = P(BATCH, None, None)
# Gathered over fsdp before a look-up: the axis cannot split the rows and the batch at once.
EMBEDDING_VD = P("tensor", None)


def path_names(path) -> tuple[str, ...]:
    """The names along a path of `jax.tree_util`."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def parameter_spec(path, value) -> P:
    """Where a parameter lies; anything in an optimiser's state lies where the parameter of that path does.

    Raises KeyError for a parameter that the table does not know.
    """
    if not value.shape:
        return P()
    names = path_names(path)
    spec = PARAMETERS.get(names[-2:]) or PARAMETERS[names[-1:]]
    return P(*(None,) * (len(value.shape) - len(spec)), *spec)


def parameter_shardings(tree, mesh: Mesh):
    """The sharding of every leaf of a parameter tree or an optimiser's state over it.

    Raises ValueError, naming the parameter, when an axis does not divide its dimension.
    """

    def one(path, value):
        spec = parameter_spec(path, value)
        for size, axes in zip(value.shape, spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                name = ".".join(path_names(path)[-2:])
                asked = " times ".join(f"mesh.{axis}" for axis in axes)
                raise ValueError(f"{asked} is {parts}: must divide {size}, a size of {name}")
        return NamedSharding(mesh, spec)

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
