"""What training minimises, and the same in units people compare."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.model.moe import RouterStats
from gptoss_jax.parallel.linear import fsdp_all_gather, fsdp_reduce_scatter, local_vocab_index
from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.rules import compute_spec, storage_spec

CHUNK_LOGITS = 1 << 25  # logits of one chunk on one device: 128 MiB in float32


def chunk_length(batch: int, length: int, vocab_size: int, shards: int = 1) -> int:
    """Positions of a chunk: the largest divisor of `length` whose logits, [B, chunk, V] split into so many
    shards, fit."""
    room = max(1, CHUNK_LOGITS * shards // (batch * vocab_size))
    return max(size for size in range(1, length + 1) if length % size == 0 and size <= room)


def split_chunks(tree: Any, chunk: int) -> Any:
    """Splits arrays [B, T, ...] into chunks of positions to scan over, [T / chunk, B, chunk, ...]."""

    def split(x):
        B, T, *rest = x.shape
        return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *rest), 1, 0)

    return jax.tree.map(split, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, chunk: int
) -> jax.Array:
    """The weighted sum of -log p(target) in nats, a float32 scalar.

    `head_VD` is float32, and so is its gradient; on a mesh both lie where parameters are stored, and each
    device works through its own rows of the batch against its own part of the vocabulary.

    Works through `chunk` positions at a time, so that the logits of all positions never exist together. When
    it is differentiated, each chunk's gradient is taken while its logits are there: no product is done twice.
    The gradient reaches `hidden_BTD` and `head_VD` only.
    """
    return _on_mesh(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, with_gradient=False)[0]


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunk):
    loss, *gradients = _on_mesh(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, with_gradient=True)
    return loss, gradients


def _backward(chunk, gradients, g):
    hidden_BTD, head_VD = gradients
    return (hidden_BTD * g).astype(hidden_BTD.dtype), head_VD * g, None, None


cross_entropy.defvjp(_forward, _backward)


def _on_mesh(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, with_gradient):
    """The loss and, if asked for, its gradients in `hidden_BTD` and in `head_VD`, float32."""
    over_chunks = functools.partial(_over_chunks, chunk=chunk, with_gradient=with_gradient)
    if not current_axes():
        return over_chunks(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, weights_BT)
    stored = storage_spec("VD", head_VD.shape, current_axes(), "head.weight")
    used = compute_spec("VD")

    def one_device(hidden_BTD, head_VD, targets_BT, weights_BT):
        weight_VD = fsdp_all_gather(head_VD.astype(hidden_BTD.dtype), stored, used)
        loss, *gradients = over_chunks(hidden_BTD, weight_VD, targets_BT, weights_BT, on_mesh=True)
        loss = jax.lax.psum(loss, BATCH)
        if not with_gradient:
            return (loss,)
        d_x_BTD, head_gradient_VD = gradients
        return loss, d_x_BTD, fsdp_reduce_scatter(head_gradient_VD, stored, used)

    return jax.shard_map(
        one_device,
        in_specs=(P(BATCH), stored, P(BATCH), P(BATCH)),
        out_specs=(P(), P(BATCH), stored) if with_gradient else (P(),),
        check_vma=False,
    )(hidden_BTD, head_VD, targets_BT, weights_BT)


def _over_chunks(hidden_BTD, weight_VD, targets_BT, weights_BT, chunk, with_gradient, on_mesh=False):
    """The same for the rows of one device, whose part of the vocabulary `weight_VD` is."""
    B, T, D = hidden_BTD.shape

    def over_vocabulary(reduce, x):
        return reduce(x, "tensor") if on_mesh else x

    def one_chunk(carry, inputs):
        loss, head_gradient_VD = carry
        x_BCD, target_BC, weight_BC = inputs
        # What stands at a position of weight zero may be anything, and zero times infinity is not zero.
        x_BCD = jnp.where(weight_BC[..., None] > 0, x_BCD, 0)
        logits_BCV = jnp.einsum(
            "BCD,VD->BCV", x_BCD, weight_VD, precision="highest", preferred_element_type=jnp.float32
        )
        largest_BC = over_vocabulary(jax.lax.pmax, jnp.max(logits_BCV, axis=-1))
        exp_BCV = jnp.exp(logits_BCV - largest_BC[..., None])
        total_BC = over_vocabulary(jax.lax.psum, jnp.sum(exp_BCV, axis=-1))
        log_total_BC = jnp.log(total_BC) + largest_BC
        index_BC, is_here_BC = target_BC, True
        if on_mesh:
            index_BC, is_here_BC = local_vocab_index(target_BC, weight_VD.shape[0])
        chosen_BC = jnp.take_along_axis(logits_BCV, index_BC[..., None], axis=-1)[..., 0]
        chosen_BC = jnp.where(is_here_BC, chosen_BC, 0)
        chosen_BC = over_vocabulary(jax.lax.psum, chosen_BC)
        # A padded position has weight zero whatever its logits are.
        loss = loss + jnp.sum(jnp.where(weight_BC > 0, (log_total_BC - chosen_BC) * weight_BC, 0))
        if not with_gradient:
            return (loss, head_gradient_VD), None
        hot_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == index_BC[..., None]
        chosen_weight_BC = jnp.where(is_here_BC, weight_BC, 0)
        scale_BC = weight_BC / total_BC
        d_logits = exp_BCV * scale_BC[..., None] - jnp.where(hot_BCV, chosen_weight_BC[..., None], 0)
        d_logits = d_logits.astype(x_BCD.dtype)
        d_x_BCD = jnp.einsum("BCV,VD->BCD", d_logits, weight_VD, precision="highest")
        outer = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
        if x_BCD.dtype == jnp.float32:
            # In this order it is the smaller of the two that XLA for CPU turns.
            head_gradient_VD = head_gradient_VD + outer("BCD,BCV->DV", x_BCD, d_logits).T
        else:
            head_gradient_VD = head_gradient_VD + outer("BCV,BCD->VD", d_logits, x_BCD)
        return (loss, head_gradient_VD), d_x_BCD

    start = (jnp.float32(0), jnp.zeros(weight_VD.shape if with_gradient else (), jnp.float32))
    inputs = split_chunks((hidden_BTD, targets_BT, weights_BT.astype(jnp.float32)), chunk)
    (loss, head_gradient_VD), d_x = jax.lax.scan(one_chunk, start, inputs)
    if with_gradient:
        d_x = over_vocabulary(jax.lax.psum, jnp.moveaxis(d_x, 0, 1).reshape(B, T, D))
    return loss, d_x, head_gradient_VD


def load_balance_loss(stats: RouterStats) -> jax.Array:
    """E * sum_e load_e * probability_e, averaged over layers: 1 where every expert gets the same (Fedus et
    al. 2021)."""
    experts = stats["load"].shape[-1]
    return experts * jnp.mean(jnp.sum(stats["load"] * stats["probability"], axis=-1))


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean squared logsumexp of the router's logits, averaged over layers (Zoph et al. 2022)."""
    return jnp.mean(stats["z"])


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """A sum of -log p over all tokens of a text, as bits for each of its UTF-8 bytes."""
    return total_nats / math.log(2) / total_bytes
