"""Flash attention for GPUs, forward and backward: Pallas kernels that Triton compiles. Never a [T, T] array.

Letters: B batch, T tokens, N query heads, K key/value heads, G = N / K, H head size. The G query heads of a
key/value head are worked through together: a *row* is one query of one of them, and the R = T * G rows are
ordered by token, then by head. So keys are read once for all G, a block of rows spans few tokens and needs
few keys outside of its window, and the gradient of a key is one sum over rows.

Segments are contiguous and positions rise in them, so places in the row say most of the mask rule: the query
at place t sees no key after t and none before its segment begins. The bounds of all loops follow: work is
half of T^2 in full layers, less where documents are packed, and T * window in sliding ones.

Formulas: MATH.md, "Learned sink"; FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2. Exponents are of
base 2: `lse` is log2 of the softmax's denominator, the sink's share included.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from gptoss_jax.kernels.attention.mask import MASKED, segment_starts
from gptoss_jax.kernels.x32 import without_x64

LOG2_E = math.log2(math.e)


class Block(NamedTuple):
    """Rows and keys that meet in one step, powers of two of at least 16, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    forward: Block
    d_queries: Block
    d_keys: Block  # and values


def block_sizes(dtype: jnp.dtype, head_size: int) -> Blocks:
    """For the H100, whose blocks of threads have 227 KiB of shared memory; not yet tuned on hardware.

    What they take in KiB, as Triton 3.6 compiles them for sm_90 (sliding or not makes no difference of 1):

    |               | forward | d_queries | d_keys |
    | bfloat16, 64  |      65 |        64 |     49 |
    | bfloat16, 128 |     129 |       128 |     97 |
    | float32, 64   |      40 |        56 |     57 |
    | float32, 128  |      52 |       104 |    105 |

    No registers are spilled, but 4 bytes in two of float32, and 396 in its forward of 128 with sink tokens.
    """
    narrow, small = jnp.dtype(dtype).itemsize < 4, head_size <= 64
    if narrow:
        return Blocks(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 64, 4 if small else 8, 2))
    # Float32 is not for tensor cores: sums are held, and operands gathered, in registers.
    return Blocks(Block(64 if small else 32, 32, 8, 2), Block(64, 32, 8, 2), Block(64, 32, 8, 2))


class Rule(NamedTuple):
    """What is fixed when a kernel is compiled."""

    window: int | None
    sink_tokens: int
    scale: float  # H ** -0.5, of the head size before it is padded
    blocks: Blocks
    interpret: bool


def triton_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    window: int | None,
    sink_tokens: int = 0,
    sinks_N: jax.Array | None = None,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """Attention of rows to themselves under the mask rule, `mask.visible`; differentiable in q, k, v
    and sinks. Returns [B, T, N, H] in the type of `q_BTNH`.

    Segments must be contiguous in a row and positions rise by one or more from token to token of a segment.
    Where they do not, as in padding whose positions are all 0, a query still sees none but its own segment's
    keys up to its own place.

    A length that is no multiple of the blocks, or a head size that is no power of two from 16, costs a padded
    copy. Float32 is multiplied as float32, narrower types on tensor cores; sums and softmax are in float32.
    `interpret` runs the kernels as plain JAX, and `blocks` replaces `block_sizes`: both for tests.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if blocks is None:
        blocks = block_sizes(q_BTNH.dtype, H)
    rule = Rule(window, sink_tokens, H**-0.5, blocks, interpret)

    more_T = -T % max(max(block.rows, block.keys) for block in blocks)
    more_H = max(16, pl.next_power_of_2(H)) - H
    q, k, v = (jnp.pad(x, ((0, 0), (0, more_T), (0, 0), (0, more_H))) for x in (q_BTNH, k_BTKH, v_BTKH))
    positions_BT = jnp.pad(positions_BT, ((0, 0), (0, more_T)))
    # What is added is a segment of its own.
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, more_T)), constant_values=-1)
    if sinks_N is None:
        sinks_N = jnp.full(N, MASKED, jnp.float32)
    out = _attention(
        rule,
        q.reshape(B, T + more_T, K, N // K, H + more_H),
        k,
        v,
        sinks_N.astype(jnp.float32).reshape(K, N // K),
        _places(positions_BT, segment_ids_BT, window, sink_tokens),
    )
    return out.reshape(q.shape)[:, :T, :, :H]


def _places(positions_BT, segment_ids_BT, window, sink_tokens):
    """Positions; per token, the place where its segment begins and that of the last query that may see it."""
    T = positions_BT.shape[1]
    place_T = jnp.arange(T, dtype=jnp.int32)
    begins_BT = segment_starts(segment_ids_BT)
    # A segment ends where, seen from behind, it begins.
    ends_BT = T - 1 - segment_starts(segment_ids_BT[:, ::-1])[:, ::-1]
    if window is None:
        return positions_BT, begins_BT, ends_BT
    lasts_BT = jnp.minimum(ends_BT, place_T + window - 1)
    if sink_tokens:
        first = (positions_BT < sink_tokens) & (place_T - begins_BT < sink_tokens)
        lasts_BT = jnp.where(first, ends_BT, lasts_BT)
    return positions_BT, begins_BT, lasts_BT


def _visible(rule, query, query_position, begin, key, key_position):
    """The mask rule. Where positions rise as they should, the bounds on places add nothing to those on
    positions. Where they do not, no pair that the loops of one kernel pass by may count in another's."""
    mask = (key <= query) & (key >= begin)
    if rule.window is None:
        return mask
    near = (query - key < rule.window) & (query_position - key_position < rule.window)
    if rule.sink_tokens:
        near |= (key - begin < rule.sink_tokens) & (key_position < rule.sink_tokens)
    return mask & near


def _dot(a, b, a_axis, b_axis):
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _span(block, size):
    return block * size + lax.iota(jnp.int32, size)


def _places_and_heads(block, rows, G):
    """Of each row of a block of rows."""
    row = _span(block, rows)
    return lax.div(row, G), lax.rem(row, G)


def _over_keys(rule, keys, begins_ref, first, last, step, carry):
    """Runs `step` over the blocks of keys that the queries at places first ... last may see."""
    begin = begins_ref[first]
    low = begin if rule.window is None else jnp.maximum(begin, first - rule.window + 1)
    low, high = lax.div(low, keys), lax.div(last, keys) + 1
    if rule.window is not None and rule.sink_tokens:
        # Only the first query's segment can begin before what is near.
        far_high = lax.div(begin + rule.sink_tokens - 1, keys) + 1
        carry = lax.fori_loop(lax.div(begin, keys), jnp.minimum(far_high, low), step, carry)
    return lax.fori_loop(low, high, step, carry)


def _forward_kernel(rule, q_ref, k_ref, v_ref, sinks_ref, positions_ref, begins_ref, out_ref, lse_ref):
    T, G, H = q_ref.shape
    rows, keys, _, _ = rule.blocks.forward
    block = T * G // rows - 1 - pl.program_id(0)  # the last rows have the most keys: first
    query, head = _places_and_heads(block, rows, G)
    q = q_ref[query, head]
    begin, query_position = begins_ref[query], positions_ref[query]

    def step(j, carry):
        out, largest, total = carry
        span = pl.ds(j * keys, keys)
        scores = _dot(q, k_ref[span], 1, 1) * (rule.scale * LOG2_E)
        mask = _visible(
            rule, query[:, None], query_position[:, None], begin[:, None],
            _span(j, keys)[None], positions_ref[span][None],
        )  # fmt: skip
        scores = jnp.where(mask, scores, MASKED)
        # While a row has seen no key, what it gathers is wrong, and is multiplied by 0 when it sees one.
        larger = jnp.maximum(largest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - larger[:, None])
        shrink = jnp.exp2(largest - larger)
        v = v_ref[span]
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, 1, 0)
        return out, larger, total * shrink + jnp.sum(weights, axis=1)

    # The sink is the first logit that a row sees; its value is 0.
    start = jnp.zeros((rows, H), jnp.float32), sinks_ref[head] * LOG2_E, jnp.ones(rows, jnp.float32)
    first, last = lax.div(block * rows, G), lax.div(block * rows + rows - 1, G)
    out, largest, total = _over_keys(rule, keys, begins_ref, first, last, step, start)
    out_ref[query, head] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[pl.ds(block * rows, rows)] = largest + jnp.log2(total)


def _d_queries_kernel(
    rule, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, positions_ref, begins_ref, dq_ref
):
    T, G, H = q_ref.shape
    rows, keys, _, _ = rule.blocks.d_queries
    block = T * G // rows - 1 - pl.program_id(0)
    query, head = _places_and_heads(block, rows, G)
    q, d_out = q_ref[query, head], d_out_ref[query, head]
    begin, query_position = begins_ref[query], positions_ref[query]
    lse, delta = (ref[pl.ds(block * rows, rows)][:, None] for ref in (lse_ref, delta_ref))

    def step(j, dq):
        span = pl.ds(j * keys, keys)
        k = k_ref[span]
        scores = _dot(q, k, 1, 1) * (rule.scale * LOG2_E)
        mask = _visible(
            rule, query[:, None], query_position[:, None], begin[:, None],
            _span(j, keys)[None], positions_ref[span][None],
        )  # fmt: skip
        weights = jnp.exp2(jnp.where(mask, scores, MASKED) - lse)
        d_scores = weights * (_dot(d_out, v_ref[span], 1, 1) - delta)
        return dq + _dot(d_scores.astype(k.dtype), k, 1, 0)

    first, last = lax.div(block * rows, G), lax.div(block * rows + rows - 1, G)
    dq = _over_keys(rule, keys, begins_ref, first, last, step, jnp.zeros((rows, H), jnp.float32))
    dq_ref[query, head] = (dq * rule.scale).astype(dq_ref.dtype)


def _d_keys_kernel(
    rule,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    positions_ref,
    begins_ref,
    lasts_ref,
    dk_ref,
    dv_ref,
):
    G, H = q_ref.shape[1:]
    rows, keys, _, _ = rule.blocks.d_keys
    block = pl.program_id(0)
    span = pl.ds(block * keys, keys)
    k, v, key, key_position = k_ref[span], v_ref[span], _span(block, keys), positions_ref[span]

    def step(i, carry):
        # Keys down, rows across: the products' left sides need not be transposed.
        dk, dv = carry
        query, head = _places_and_heads(i, rows, G)
        q, d_out = q_ref[query, head], d_out_ref[query, head]
        lse, delta = (ref[pl.ds(i * rows, rows)][None] for ref in (lse_ref, delta_ref))
        scores = _dot(k, q, 1, 1) * (rule.scale * LOG2_E)
        mask = _visible(
            rule, query[None], positions_ref[query][None], begins_ref[query][None],
            key[:, None], key_position[:, None],
        )  # fmt: skip
        weights = jnp.exp2(jnp.where(mask, scores, MASKED) - lse)
        dv += _dot(weights.astype(d_out.dtype), d_out, 1, 0)
        d_scores = weights * (_dot(v, d_out, 1, 1) - delta)
        return dk + _dot(d_scores.astype(q.dtype), q, 1, 0), dv

    first, last = block * keys * G, jnp.max(lasts_ref[span]) * G + G - 1
    nothing = jnp.zeros((keys, H), jnp.float32)
    dk, dv = lax.fori_loop(lax.div(first, rows), lax.div(last, rows) + 1, step, (nothing, nothing))
    dk_ref[span] = (dk * rule.scale).astype(dk_ref.dtype)
    dv_ref[span] = dv.astype(dv_ref.dtype)


def _call(rule, kernel, block, programs, inputs, outputs):
    """Runs `kernel` for each block (there are `programs`), key/value head and batch row. Inputs are pairs of
    axes and array, outputs of axes and type; a kernel gets its own head's and batch row's part of each."""
    own = {"K": 1, "B": 2}  # axes of the grid

    def spec(axes, array):
        shape = tuple(None if axis in own else size for axis, size in zip(axes, array.shape, strict=True))
        return pl.BlockSpec(shape, lambda *ids: tuple(ids[own[axis]] if axis in own else 0 for axis in axes))

    B, _, K, _ = inputs[1][1].shape
    return pl.pallas_call(
        functools.partial(kernel, rule),
        grid=(programs, K, B),
        in_specs=[spec(*pair) for pair in inputs],
        out_specs=[spec(*pair) for pair in outputs],
        out_shape=[shape for _, shape in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=rule.interpret,
    )(*(array for _, array in inputs))


def _like(axes, array):
    return axes, jax.ShapeDtypeStruct(array.shape, array.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@without_x64
def _attention(rule, q_BTKGH, k_BTKH, v_BTKH, sinks_KG, places):
    return _attention_fwd(rule, q_BTKGH, k_BTKH, v_BTKH, sinks_KG, places)[0]


@without_x64
def _attention_fwd(rule, q_BTKGH, k_BTKH, v_BTKH, sinks_KG, places):
    B, T, K, G, _ = q_BTKGH.shape
    positions_BT, begins_BT, _ = places
    block = rule.blocks.forward
    out_BTKGH, lse_BKR = _call(
        rule,
        _forward_kernel,
        block,
        T * G // block.rows,
        [
            ("BTKGH", q_BTKGH), ("BTKH", k_BTKH), ("BTKH", v_BTKH), ("KG", sinks_KG),
            ("BT", positions_BT), ("BT", begins_BT),
        ],
        [_like("BTKGH", q_BTKGH), ("BKR", jax.ShapeDtypeStruct((B, K, T * G), jnp.float32))],
    )  # fmt: skip
    return out_BTKGH, (q_BTKGH, k_BTKH, v_BTKH, sinks_KG, places, out_BTKGH, lse_BKR)


@without_x64
def _attention_bwd(rule, residuals, d_out_BTKGH):
    q_BTKGH, k_BTKH, v_BTKH, sinks_KG, places, out_BTKGH, lse_BKR = residuals
    B, T, K, G, _ = q_BTKGH.shape
    positions_BT, begins_BT, lasts_BT = places
    delta_BTKG = jnp.sum(d_out_BTKGH.astype(jnp.float32) * out_BTKGH.astype(jnp.float32), axis=-1)
    delta_BKR = delta_BTKG.transpose(0, 2, 1, 3).reshape(B, K, T * G)
    inputs = [
        ("BTKGH", q_BTKGH), ("BTKH", k_BTKH), ("BTKH", v_BTKH), ("BTKGH", d_out_BTKGH),
        ("BKR", lse_BKR), ("BKR", delta_BKR), ("BT", positions_BT), ("BT", begins_BT),
    ]  # fmt: skip

    block = rule.blocks.d_queries
    outputs = [_like("BTKGH", q_BTKGH)]
    (dq_BTKGH,) = _call(rule, _d_queries_kernel, block, T * G // block.rows, inputs, outputs)

    block = rule.blocks.d_keys
    inputs, outputs = [*inputs, ("BT", lasts_BT)], [_like("BTKH", k_BTKH), _like("BTKH", v_BTKH)]
    dk_BTKH, dv_BTKH = _call(rule, _d_keys_kernel, block, T // block.keys, inputs, outputs)

    share_BKTG = jnp.exp2(sinks_KG[:, None] * LOG2_E - lse_BKR.reshape(B, K, T, G))
    d_sinks_KG = -jnp.sum(share_BKTG * delta_BKR.reshape(B, K, T, G), axis=(0, 2))
    return dq_BTKGH, dk_BTKH, dv_BTKH, d_sinks_KG, None


_attention.defvjp(_attention_fwd, _attention_bwd)
