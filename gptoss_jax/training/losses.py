"""Cross-entropy in chunks over the sequence, and the router losses.

Letters: C positions of a chunk; V the vocabulary, or one device's shard of it in `_scan_chunks`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.model.moe import RouterStats
from gptoss_jax.parallel.linear import gather_parameter, local_vocab_index, reduce_gradient
from gptoss_jax.parallel.mesh import BATCH, current_axes
from gptoss_jax.parallel.rules import ROWS, compute_spec, storage_spec

CHUNK_LOGITS = 1 << 25  # logits of one chunk on one device: 128 MiB in float32


def chunk_length(batch: int, length: int, vocab_size: int, shards: int = 1) -> int:
    """Returns the positions in a chunk: the largest divisor of `length` for which each of the `shards` of the
    logits [B, C, V] has at most `CHUNK_LOGITS` elements; at least 1."""
    most = max(1, CHUNK_LOGITS * shards // (batch * vocab_size))
    return max(size for size in range(1, length + 1) if length % size == 0 and size <= most)


def split_chunks(tree: Any, chunk: int) -> Any:
    """Splits arrays [B, T, ...] into chunks of positions to scan over, [T / chunk, B, chunk, ...]."""

    def split(x):
        B, T, *rest = x.shape
        return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *rest), 1, 0)

    return jax.tree.map(split, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """Returns the weighted sum of -log p(target) in nats, a float32 scalar.

    Works through `chunk` positions at a time (default: `chunk_length`), so that the logits of all positions
    never exist together. Under differentiation each chunk's gradient is computed while its logits exist: no
    product is computed twice. Only `hidden_BTD` and `head_VD` get a gradient.

    `head_VD` and its gradient are float32. On a mesh both are sharded as parameters are stored, and each
    device processes its rows of the batch against its shard of the vocabulary. If a weight is not positive,
    the values of hidden state and target are ignored.
    """
    return _loss_and_gradients(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, with_gradient=False)[0]


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunk):
    loss, *gradients = _loss_and_gradients(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, True)
    return loss, gradients


def _backward(chunk, gradients, g):
    d_hidden_BTD, d_head_VD = gradients
    return (d_hidden_BTD * g).astype(d_hidden_BTD.dtype), d_head_VD * g, None, None


cross_entropy.defvjp(_forward, _backward)


def _loss_and_gradients(hidden_BTD, head_VD, targets_BT, weights_BT, chunk, with_gradient):
    """Returns (loss,) or (loss, gradient of `hidden_BTD`, float32 gradient of `head_VD`)."""
    axes = current_axes()
    if chunk is None:
        # The batch axes split the rows, the tensor axis splits the vocabulary.
        B, T = targets_BT.shape
        chunk = chunk_length(B, T, head_VD.shape[0], math.prod(axes.values()))
    scan_chunks = functools.partial(_scan_chunks, chunk=chunk, with_gradient=with_gradient)
    if not axes:
        return scan_chunks(hidden_BTD, head_VD.astype(hidden_BTD.dtype), targets_BT, weights_BT)
    stored, used = storage_spec("VD", head_VD.shape, axes, "head.weight"), compute_spec("VD")

    def one_device(hidden_BTD, head_VD, targets_BT, weights_BT):
        weight_VD = gather_parameter(head_VD.astype(hidden_BTD.dtype), stored, used)
        loss, *gradients = scan_chunks(hidden_BTD, weight_VD, targets_BT, weights_BT, is_sharded=True)
        loss = jax.lax.psum(loss, BATCH)
        if not with_gradient:
            return (loss,)
        d_hidden_BTD, d_head_VD = gradients
        return loss, d_hidden_BTD, reduce_gradient(d_head_VD, stored, used)

    return jax.shard_map(
        one_device,
        in_specs=(ROWS, stored, ROWS, ROWS),
        out_specs=(P(), ROWS, stored) if with_gradient else (P(),),
        check_vma=False,
    )(hidden_BTD, head_VD, targets_BT, weights_BT)


def _scan_chunks(hidden_BTD, weight_VD, targets_BT, weights_BT, *, chunk, with_gradient, is_sharded=False):
    """`_loss_and_gradients` for the rows of one device and its shard of the vocabulary, `weight_VD`."""
    B, T, D = hidden_BTD.shape
    einsum = functools.partial(jnp.einsum, precision="highest")
    einsum_float32 = functools.partial(einsum, preferred_element_type=jnp.float32)

    def over_vocabulary(reduce, x):
        return reduce(x, "tensor") if is_sharded else x

    def one_chunk(carry, inputs):
        loss, d_head_VD = carry
        x_BCD, target_BC, weight_BC = inputs
        # Positions of weight 0 may hold any value, and 0 times infinity is not 0.
        x_BCD = jnp.where(weight_BC[..., None] > 0, x_BCD, 0)
        logits_BCV = einsum_float32("BCD,VD->BCV", x_BCD, weight_VD)
        max_BC = over_vocabulary(jax.lax.pmax, jnp.max(logits_BCV, axis=-1))
        exp_BCV = jnp.exp(logits_BCV - max_BC[..., None])
        sum_BC = over_vocabulary(jax.lax.psum, jnp.sum(exp_BCV, axis=-1))
        logsumexp_BC = jnp.log(sum_BC) + max_BC
        index_BC, is_here_BC = (
            local_vocab_index(target_BC, weight_VD.shape[0]) if is_sharded else (target_BC, True)
        )
        chosen_BC = jnp.take_along_axis(logits_BCV, index_BC[..., None], axis=-1)[..., 0]
        chosen_BC = over_vocabulary(jax.lax.psum, jnp.where(is_here_BC, chosen_BC, 0))
        loss = loss + jnp.sum(jnp.where(weight_BC > 0, (logsumexp_BC - chosen_BC) * weight_BC, 0))
        if not with_gradient:
            return (loss, d_head_VD), None
        is_target_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == index_BC[..., None]
        target_weight_BC = jnp.where(is_here_BC, weight_BC, 0)
        d_logits_BCV = exp_BCV * (weight_BC / sum_BC)[..., None]
        d_logits_BCV = d_logits_BCV - jnp.where(is_target_BCV, target_weight_BC[..., None], 0)
        d_logits_BCV = d_logits_BCV.astype(x_BCD.dtype)
        d_x_BCD = einsum("BCV,VD->BCD", d_logits_BCV, weight_VD)
        if x_BCD.dtype == jnp.float32:
            # In this order XLA for CPU transposes the smaller of the two.
            d_head_VD = d_head_VD + einsum_float32("BCD,BCV->DV", x_BCD, d_logits_BCV).T
        else:
            d_head_VD = d_head_VD + einsum_float32("BCV,BCD->VD", d_logits_BCV, x_BCD)
        return (loss, d_head_VD), d_x_BCD

    start = (jnp.float32(0), jnp.zeros(weight_VD.shape if with_gradient else (), jnp.float32))
    inputs = split_chunks((hidden_BTD, targets_BT, weights_BT.astype(jnp.float32)), chunk)
    (loss, d_head_VD), d_x = jax.lax.scan(one_chunk, start, inputs)
    if not with_gradient:
        return (loss,)
    d_hidden_BTD = over_vocabulary(jax.lax.psum, jnp.moveaxis(d_x, 0, 1).reshape(B, T, D))
    return loss, d_hidden_BTD, d_head_VD


def load_balance_loss(stats: RouterStats) -> jax.Array:
    """Load-balance loss of Fedus et al. 2021, averaged over layers: E * sum_e load_e * probability_e, which
    is 1 if every expert gets the same share."""
    num_experts = stats["load"].shape[-1]
    return num_experts * jnp.mean(jnp.sum(stats["load"] * stats["probability"], axis=-1))


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Mean squared logsumexp of the router's logits, averaged over layers (Zoph et al. 2022)."""
    return jnp.mean(stats["z"])


def router_losses(config: ModelConfig, stats: RouterStats) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the router losses, weighted as in the config, and the routers' metrics."""
    balance, z = load_balance_loss(stats), router_z_loss(stats)
    metrics = {"load_balance_loss": balance, "router_z_loss": z, "expert_load": stats["load"]}
    metrics["dropped"] = jnp.mean(stats["dropped"])
    return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z, metrics


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Converts the sum of -log p over all tokens of a text to bits per UTF-8 byte."""
    return total_nats / math.log(2) / total_bytes
