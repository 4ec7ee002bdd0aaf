"""Chunked cross-entropy, and the router losses.

Letters: C positions per chunk; V vocabulary or, in `_scan_chunks`, one device's shard of it.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import ModelConfig
from gptoss_jax.kernels import backend
from gptoss_jax.kernels.cpu import grouped
from gptoss_jax.kernels.layer_view import as_view
from gptoss_jax.model.moe import RouterStats
from gptoss_jax.model.parameters import LETTERS
from gptoss_jax.parallel.mesh import BATCH, batch_shards, current_axes
from gptoss_jax.parallel.rules import ROWS, storage_spec
from gptoss_jax.parallel.vocabulary import (
    HeadSplit,
    head_gradient,
    head_shard,
    local_vocab_index,
    split_head,
)

Arrays = tuple[jax.Array, ...]
Gradients = tuple[jax.Array | None, ...]  # None for a weight that is not trained
CHUNK_LOGITS = 1 << 25  # maximum number of logits per chunk and device: 128 MiB in float32


def chunk_length(batch: int, length: int, vocab_size: int, shards: int = 1) -> int:
    """Returns the number of positions per chunk: the largest divisor of `length` for which each of the
    `shards` of the logits [B, C, V] has at most `CHUNK_LOGITS` elements; at least 1."""
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
    hidden: Arrays,
    head: Arrays,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """Returns the weighted sum of -log p(target) in nats, a float32 scalar.

    Processes `chunk` positions at a time (default: `chunk_length`), so the full logits are never
    materialized. Under differentiation, the gradient of a chunk is computed while its logits are in memory,
    so no matmul is computed twice. Only `hidden` and `head` are differentiable, and gradients of weights that
    are not differentiated are not computed.

    On a mesh, the head weights and their gradients have the storage sharding of parameters. Each device
    processes its shard of the vocabulary, for its own rows of the batch and for those of the devices with
    which it exchanges hidden states (`parallel/vocabulary.py`). If a loss weight is not positive, hidden
    state and target are ignored: such positions are moved to the end of their row, and chunks with only such
    positions are skipped.

    Args:
      hidden, head: from `Transformer.head_operands`: the logits are the sum of the products of each
        activation, [B, T, D], and its weight, [V, D].
    """
    return _loss_and_gradients(hidden, head, targets_BT, _positive(weights_BT), chunk)[0]


def _forward(
    hidden: Any, head: Any, targets: Any, weights: Any, chunk: int | None
) -> tuple[jax.Array, tuple[Arrays, Gradients]]:
    """The arguments are `jax.custom_derivatives.CustomVJPPrimal`s, or tuples of them."""
    is_trained = tuple(weight.perturbed for weight in head)
    hidden, head, targets, weights = jax.tree.map(
        lambda primal: primal.value, (hidden, head, targets, weights)
    )
    loss, d_hidden, d_head = _loss_and_gradients(hidden, head, targets, _positive(weights), chunk, is_trained)
    return loss, (d_hidden, d_head)


def _backward(
    chunk: int | None, gradients: tuple[Arrays, Gradients], g: jax.Array
) -> tuple[Arrays, Gradients, None, None]:
    return *jax.tree.map(lambda gradient: (gradient * g).astype(gradient.dtype), gradients), None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _positive(weights_BT: jax.Array) -> jax.Array:
    return jnp.where(weights_BT > 0, weights_BT, 0).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def log_probs(
    hidden: Arrays, head: Arrays, targets_BT: jax.Array, mask_BT: jax.Array, chunk: int | None = None
) -> jax.Array:
    """Returns log p(target) of each position in the mask, float32 [B, T], and 0 elsewhere.

    Like `cross_entropy`, it never materializes the full logits, and positions outside of the mask are
    ignored. The backward pass computes the logits of each chunk again.
    """
    return -_loss_and_gradients(hidden, head, targets_BT, _positive(mask_BT), chunk)[1]


def _log_probs_forward(
    hidden: Any, head: Any, targets: Any, mask: Any, chunk: int | None
) -> tuple[jax.Array, tuple]:
    """The arguments are as in `_forward`."""
    # Which weights are trained is in the structure of the residuals, because their values are traced.
    kinds = tuple({"trained" if weight.perturbed else "frozen": weight.value} for weight in head)
    hidden, head, targets, mask = jax.tree.map(lambda primal: primal.value, (hidden, head, targets, mask))
    return log_probs(hidden, head, targets, mask, chunk), (hidden, kinds, targets, mask)


def _log_probs_backward(
    chunk: int | None, residuals: tuple, g_BT: jax.Array
) -> tuple[Arrays, Gradients, None, None]:
    hidden, kinds, targets_BT, mask_BT = residuals
    head = tuple(next(iter(kind.values())) for kind in kinds)
    weights_BT = jnp.where(mask_BT > 0, -g_BT, 0).astype(jnp.float32)
    is_trained = tuple("trained" in kind for kind in kinds)
    return *_loss_and_gradients(hidden, head, targets_BT, weights_BT, chunk, is_trained)[1:], None, None


log_probs.defvjp(_log_probs_forward, _log_probs_backward, symbolic_zeros=True)


def _loss_and_gradients(
    hidden: Arrays,
    head: Arrays,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int | None,
    is_trained: tuple[bool, ...] | None = None,
) -> tuple[Any, ...]:
    """Returns the weighted sum of -log p(target), and -log p(target) [B, T] of positions whose weight is not
    zero; with `is_trained`, instead of the latter, the gradients of `hidden` and of `head`, None for weights
    that are not trained. Weights may be negative."""
    axes = current_axes()
    if chunk is None:
        # The batch axes split the rows, the tensor axis splits the vocabulary.
        B, T = targets_BT.shape
        chunk = chunk_length(B, T, head[0].shape[0], math.prod(axes.values()))
    dtype = hidden[0].dtype
    scan_chunks = functools.partial(_scan_chunks, chunk=chunk, is_trained=is_trained)
    if not axes:
        found = scan_chunks(hidden, _cast(head, dtype), targets_BT, weights_BT, split=HeadSplit())
        return found if is_trained is None else (*found[:2], _as_types(found[2], head))
    names = ("head.weight", "head.lora_b")[: len(head)]
    stored = tuple(
        storage_spec(LETTERS[name], weight.shape, axes, name)
        for name, weight in zip(names, head, strict=True)
    )
    split = split_head(stored, head[0].shape[0], targets_BT.size // batch_shards(axes))

    def one_device(hidden, head, targets_BT, weights_BT):
        shards = tuple(
            head_shard(weight, spec, split) for weight, spec in zip(_cast(head, dtype), stored, strict=True)
        )
        loss, *rest = scan_chunks(hidden, shards, targets_BT, weights_BT, split=split)
        # Devices that exchange hidden states have the same sum.
        loss = jax.lax.psum(loss, tuple(axis for axis in BATCH if axis not in split.exchanged))
        if is_trained is None:
            return loss, *rest
        d_hidden, d_head = rest
        d_head = (
            None if d is None else head_gradient(d, spec, split)
            for d, spec in zip(d_head, stored, strict=True)
        )
        return loss, d_hidden, _as_types(d_head, head)

    specs = tuple(ROWS for _ in hidden)
    d_specs = tuple(spec if train else None for spec, train in zip(stored, is_trained or (), strict=False))
    return jax.shard_map(
        one_device,
        in_specs=(specs, stored, ROWS, ROWS),
        out_specs=(P(), ROWS) if is_trained is None else (P(), specs, d_specs),
        check_vma=False,
    )(hidden, head, targets_BT, weights_BT)


def _cast(head: Arrays, dtype: jnp.dtype) -> Arrays:
    return tuple(weight.astype(dtype) for weight in head)


def _as_types(gradients: Iterable[jax.Array | None], weights: Arrays) -> Gradients:
    return tuple(None if d is None else d.astype(w.dtype) for d, w in zip(gradients, weights, strict=True))


def _scan_chunks(
    hidden: Arrays,
    head: Arrays,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    is_trained: tuple[bool, ...] | None,
    split: HeadSplit,
) -> tuple[Any, ...]:
    """`_loss_and_gradients` for the rows of one device and its shard of the vocabulary, `head`."""
    B, T = targets_BT.shape
    one_chunk = functools.partial(_one_chunk, head=head, is_trained=is_trained, split=split)

    def skip(carry, inputs):
        if is_trained is None:
            return carry, jnp.zeros((B, chunk), jnp.float32)
        return carry, [jnp.zeros_like(x) for x in inputs[0]]

    def one_chunk_if_needed(carry, inputs):
        return jax.lax.cond(inputs[-1], one_chunk, skip, carry, inputs)

    zeros = [
        jnp.zeros(weight.shape, jnp.float32) if train else None
        for weight, train in zip(head, is_trained or [False] * len(head), strict=True)
    ]
    order_BT = _sorted_positions(weights_BT == 0)
    arrays = (hidden, targets_BT, weights_BT.astype(jnp.float32))
    xs, targets, weights = split_chunks(jax.tree.map(lambda x: _reorder(x, order_BT), arrays), chunk)
    is_needed = jnp.any(weights != 0, axis=(1, 2))
    if split.vocabulary:
        # All devices must agree, because each takes part in the collectives of a chunk.
        is_needed = jax.lax.pmax(is_needed.astype(jnp.int32), BATCH) > 0
    targets, weights = (split.exchange(x, axis=1) for x in (targets, weights))
    chunks = (xs, targets, weights, is_needed)
    (loss, d_head), results = jax.lax.scan(one_chunk_if_needed, (jnp.float32(0), zeros), chunks)
    back_BT = _sorted_positions(order_BT)
    results = jax.tree.map(
        lambda x: _reorder(jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), back_BT), results
    )
    if is_trained is None:
        return loss, results
    return loss, tuple(map(split.sum_over_tensor, results)), tuple(d_head)


def _one_chunk(
    carry: tuple[jax.Array, list],
    inputs: tuple,
    *,
    head: Arrays,
    is_trained: tuple[bool, ...] | None,
    split: HeadSplit,
) -> tuple[tuple[jax.Array, list], list[jax.Array] | jax.Array]:
    """Adds the loss and the gradients of `head` in a chunk to `carry`; also returns the gradients of
    `hidden` or, without `is_trained`, -log p(target) of this device's rows."""
    loss, d_head = carry
    xs, target_BC, weight_BC, _ = inputs
    # Hidden states are exchanged here, because those of all chunks would need much memory. Positions with
    # weight 0 may contain inf or NaN, and 0 * inf is NaN.
    xs = [jnp.where(weight_BC[..., None] != 0, split.exchange(x), 0) for x in xs]
    if backend.platform() == "cpu":
        # Products in float32: gradients of logits are then not rounded.
        xs = [x.astype(jnp.float32) for x in xs]
    # The letter of the contracted axis: D, or r for an adapter.
    pairs = [*zip("Dr", head, strict=False)]
    products = [_einsum(f"BC{d},V{d}->BCV", x, w, jnp.float32) for (d, w), x in zip(pairs, xs, strict=True)]
    logits_BCV = functools.reduce(jnp.add, products)
    max_BC = split.over_vocabulary(jax.lax.pmax, jnp.max(logits_BCV, axis=-1))
    exp_BCV = jnp.exp(logits_BCV - max_BC[..., None])
    sum_BC = split.over_vocabulary(jax.lax.psum, jnp.sum(exp_BCV, axis=-1))
    logsumexp_BC = jnp.log(sum_BC) + max_BC
    index_BC, is_here_BC = local_vocab_index(target_BC, head[0].shape[0], split.vocabulary)
    chosen_BC = jnp.take_along_axis(logits_BCV, index_BC[..., None], axis=-1)[..., 0]
    chosen_BC = split.over_vocabulary(jax.lax.psum, jnp.where(is_here_BC, chosen_BC, 0))
    nats_BC = jnp.where(weight_BC != 0, logsumexp_BC - chosen_BC, 0)
    loss = loss + jnp.sum(nats_BC * weight_BC)
    if is_trained is None:
        return (loss, d_head), split.own_rows(nats_BC)
    is_target_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == index_BC[..., None]
    target_weight_BC = jnp.where(is_here_BC, weight_BC, 0)
    d_logits_BCV = exp_BCV * (weight_BC / sum_BC)[..., None]
    d_logits_BCV = d_logits_BCV - jnp.where(is_target_BCV, target_weight_BC[..., None], 0)
    d_logits_BCV = d_logits_BCV.astype(xs[0].dtype)

    def weight_gradient(d, x):
        return _einsum(f"BCV,BC{d}->V{d}", d_logits_BCV, x, jnp.float32)

    def hidden_gradient(d, weight):
        # In float32 if it is summed over devices.
        result_type = jnp.float32 if split.exchanged else None
        product = _einsum(f"BCV,V{d}->BC{d}", d_logits_BCV, weight, result_type)
        return split.reduce(product).astype(weight.dtype)

    d_head = [
        None if total is None else total + weight_gradient(d, x)
        for total, (d, _), x in zip(d_head, pairs, xs, strict=True)
    ]
    return (loss, d_head), [hidden_gradient(d, weight) for d, weight in pairs]


def _einsum(equation: str, x: jax.Array, y: jax.Array, result_type: jnp.dtype | None) -> jax.Array:
    """`jnp.einsum` in full precision, on CPU by the kernel of the grouped matmul."""
    if grouped.supports_einsum(equation, x, result_type):
        return grouped.einsum(equation, x, as_view(y))
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=result_type)


def _sorted_positions(keys_BT: jax.Array) -> jax.Array:
    """Returns the positions of each row in a stable sort by key."""
    positions_BT = jax.lax.broadcasted_iota(jnp.int32, keys_BT.shape, 1)
    return jax.lax.sort_key_val(keys_BT, positions_BT, dimension=1, is_stable=True)[1]


def _reorder(x: jax.Array, order_BT: jax.Array) -> jax.Array:
    """Returns `x` [B, T, ...] with the positions of each row reordered."""
    return jnp.take_along_axis(x, order_BT.reshape(*order_BT.shape, *(1,) * (x.ndim - 2)), axis=1)


def load_balance_loss(stats: RouterStats) -> jax.Array:
    """Load-balance loss of Fedus et al. 2021, averaged over layers: E * sum_e load_e * probability_e, which
    is 1 for balanced experts."""
    num_experts = stats["load"].shape[-1]
    return num_experts * jnp.mean(jnp.sum(stats["load"] * stats["probability"], axis=-1))


def router_z_loss(stats: RouterStats) -> jax.Array:
    """Router z-loss (Zoph et al. 2022): mean squared logsumexp of the router logits, averaged over layers."""
    return jnp.mean(stats["z"])


def router_losses(config: ModelConfig, stats: RouterStats) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted sum of the router losses, and the router metrics."""
    balance, z = load_balance_loss(stats), router_z_loss(stats)
    metrics = {"load_balance_loss": balance, "router_z_loss": z, "expert_load": stats["load"]}
    metrics["dropped"] = jnp.mean(stats["dropped"])
    return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z, metrics


def bits_per_byte(total_nats: float, total_bytes: int) -> float:
    """Converts the total -log p of a text, in nats, to bits per UTF-8 byte."""
    return total_nats / math.log(2) / total_bytes
