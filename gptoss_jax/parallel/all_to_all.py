"""All-to-all of rows to the devices with their experts, and back: two equivalent transports.

The number of rows that a device receives depends on the router, and may be all rows of all devices. Buffers
therefore have a fixed size, and excess rows are sent in additional rounds, which are rare. All devices along
the expert axis know the number of rounds, because each has the row counts of all devices.

Letters: R rows per device, sorted by expert; C rows per buffer; E experts on all devices; n devices along the
expert axis; L = E / n experts per device (elsewhere: layers).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend

# Keeps row counts and offsets int32 with jax_enable_x64, which would make sums int64.
_sum = functools.partial(jnp.sum, dtype=jnp.int32)
_cumsum = functools.partial(jnp.cumsum, dtype=jnp.int32)

# Buffer size in percent of the rows under balanced routing: per receiving device for the ragged transport,
# per pair of devices for the padded one, where the smaller counts vary more.
BUFFER_PERCENT = {"ragged": 125, "padded": 150}
# Minimum buffer size in rows, unless fewer can arrive, so that decoding takes one round.
MIN_BUFFER_ROWS = 256


@jax.custom_vjp
def gather_rows(x_RD: jax.Array, index_C: jax.Array, inverse_R: jax.Array | None = None) -> jax.Array:
    """Returns `x_RD[index_C]`, zero for an index of -1. No row may be gathered twice.

    `inverse_R`, required for the gradient, is the index of each row in the result, or -1; with it, the
    gradient is also a gather instead of a scatter.
    """
    return jnp.where((index_C >= 0)[:, None], x_RD.at[index_C].get(mode="clip"), 0)


gather_rows.defvjp(
    lambda x_RD, index_C, inverse_R: (gather_rows(x_RD, index_C, inverse_R), (index_C, inverse_R)),
    lambda residuals, g_CD: (gather_rows(g_CD, *residuals[::-1]), None, None),
)


class Round(NamedTuple):
    """One round of an all-to-all."""

    dispatch: Callable[[jax.Array], jax.Array]  # [R, D] -> [C, D], rows sorted by local expert
    combine: Callable[[jax.Array], jax.Array]  # [C, D] -> [R, D], zero in rows of other rounds
    group_sizes_L: jax.Array  # int32, rows per local expert


def transport(
    rows: int, devices: int, local_experts: int, max_expert_rows: int | None = None
) -> "RaggedAllToAll | PaddedAllToAll":
    """Returns the transport for the target backend.

    Args:
      rows, devices, local_experts: R, n and L.
      max_expert_rows: maximum rows per expert; None without a limit.
    """
    every = devices * rows
    if max_expert_rows is not None:
        every = min(every, max_expert_rows * local_experts)
    even = {"ragged": rows, "padded": -(-rows // devices)}
    buffer = {name: -(-size * BUFFER_PERCENT[name] // 100) for name, size in even.items()}
    if has_ragged():
        size = every if max_expert_rows is not None else min(every, max(buffer["ragged"], MIN_BUFFER_ROWS))
        return RaggedAllToAll(size, max_rounds=-(-every // size))
    size = min(rows, every, max(buffer["padded"], MIN_BUFFER_ROWS // devices))
    return PaddedAllToAll(size, max_rounds=-(-min(rows, every) // size))


def has_ragged() -> bool:
    """Returns True if the target backend has `ragged_all_to_all`: GPUs, and TPUs except v5e, where it is
    missing on slices of more than 16 chips."""
    if backend.platform() == "tpu":
        return not backend.device_kind().startswith(("TPU v5 lite", "TPU v5e"))
    return backend.platform() == "gpu"


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll:
    """Uses `ragged_all_to_all` with one slice per expert; rows arrive sorted by expert, without padding."""

    buffer_rows: int  # C
    max_rounds: int

    def num_rounds(self, counts_nE: jax.Array) -> jax.Array:
        """Returns the number of rounds, from row counts by device and expert: that of the fullest device."""
        n, E = counts_nE.shape
        return -(-jnp.max(_sum(counts_nE.reshape(n, n, E // n), (0, 2))) // self.buffer_rows)

    def plan_round(self, counts_nE: jax.Array, rows: int, index: jax.Array | int) -> Round:
        """Returns round `index`, for R = `rows` rows of this device.

        The rows that a device receives in all rounds are sorted by expert, then by sender. Round `index`
        moves rows starting at `index * C` in that order.
        """
        n, E = counts_nE.shape
        device = jax.lax.axis_index("expert")
        at_sender_nE = _cumsum(counts_nE, 1) - counts_nE
        by_owner = (
            counts_nE.reshape(n, n, E // n).transpose(1, 2, 0).reshape(n, E)
        )  # [owner, (expert, sender)]
        begins = (_cumsum(by_owner, 1) - by_owner).reshape(n, E // n, n)
        begins = begins.transpose(2, 0, 1).reshape(n, E)
        low, high = index * self.buffer_rows, (index + 1) * self.buffer_rows
        first_nE, end_nE = (jnp.clip(place, low, high) for place in (begins, begins + counts_nE))
        sizes_nE = end_nE - first_nE
        at_sender_nE = at_sender_nE + first_nE - begins
        at_owner_nE = first_nE - low

        def sent(x_nE):  # this device's slices
            return x_nE[device]

        def owned(x_nE):  # all devices' slices for this device's experts
            return jax.lax.dynamic_slice_in_dim(x_nE, device * (E // n), E // n, axis=1).reshape(-1)

        there = Slices(sent(at_sender_nE), sent(sizes_nE), sent(at_owner_nE), owned(sizes_nE))
        back = Slices(owned(at_owner_nE), owned(sizes_nE), owned(at_sender_nE), sent(sizes_nE))
        return Round(
            lambda x_RD: send_slices(x_RD, there, back, self.buffer_rows),
            lambda y_CD: send_slices(y_CD, back, there, rows),
            _sum(owned(sizes_nE).reshape(n, E // n), 0),
        )


class Slices(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all` for one direction: E slices of rows, one per expert, in the
    order of the devices that have the experts."""

    read_E: jax.Array  # start of each slice on this device
    sizes_E: jax.Array  # rows in each slice
    write_E: jax.Array  # start of each slice on the receiving device
    received_E: jax.Array  # rows in each incoming slice


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def send_slices(x_RD: jax.Array, there: Slices, back: Slices, rows: int) -> jax.Array:
    """Sends slices of rows along the expert axis; returns [rows, D], zero where nothing arrives.

    `back` describes the reverse direction, for the gradient.
    """
    move = ragged_all_to_all if has_ragged() else reference_all_to_all
    return move(x_RD, there, rows)


send_slices.defvjp(
    # Only the number of rows is saved, in an array without columns.
    lambda x_RD, there, back, rows: (send_slices(x_RD, there, back, rows), (there, back, x_RD[:, :0])),
    lambda rows, saved, g_CD: (send_slices(g_CD, saved[1], saved[0], saved[2].shape[0]), None, None),
)


def ragged_all_to_all(x_RD: jax.Array, slices: Slices, rows: int) -> jax.Array:
    """Runs the collective, for `send_slices`."""
    empty = jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype)
    return jax.lax.ragged_all_to_all(x_RD, empty, *slices, axis_name="expert")


def reference_all_to_all(x_RD: jax.Array, slices: Slices, rows: int) -> jax.Array:
    """Reference implementation for all backends: gathers all rows, and each device selects its own."""
    sources = jax.lax.axis_index("expert") * x_RD.shape[0] + slices.read_E
    x_RD = jax.lax.all_gather(x_RD, "expert", tiled=True)
    read_E, write_E = (
        jax.lax.all_to_all(place, "expert", 0, 0, tiled=True) for place in (sources, slices.write_E)
    )
    return gather_rows(x_RD, _in_slices(rows, write_E, slices.received_E, read_E))


@dataclasses.dataclass(frozen=True)
class PaddedAllToAll:
    """Uses `all_to_all`: the same number of rows between each pair of devices, padded with zeros; received
    rows are then sorted by expert."""

    pair_rows: int  # rows from one device to another: C = n * pair_rows
    max_rounds: int

    def num_rounds(self, counts_nE: jax.Array) -> jax.Array:
        """Returns the number of rounds for the pair of devices with the most rows."""
        n, E = counts_nE.shape
        return -(-jnp.max(_sum(counts_nE.reshape(n, n, E // n), 2)) // self.pair_rows)

    def plan_round(self, counts_nE: jax.Array, rows: int, index: jax.Array | int) -> Round:
        """Returns round `index`: rows starting at `index * pair_rows`, between each pair of devices."""
        n, E = counts_nE.shape
        device = jax.lax.axis_index("expert")
        pairs_nnL = counts_nE.reshape(n, n, E // n)
        low, high = index * self.pair_rows, (index + 1) * self.pair_rows
        slots_n = jnp.arange(n, dtype=jnp.int32) * self.pair_rows

        # Rows of this device: those for the same destination are contiguous.
        counts_n = _sum(pairs_nnL[device], 1)
        starts_n = _cumsum(counts_n, 0) - counts_n
        sent_n = jnp.clip(counts_n - low, 0, self.pair_rows)
        departing = (slots_n, sent_n, starts_n + low)
        # Rows arrive sorted by sender, then by expert; they are then sorted by expert.
        arriving_nL = jax.lax.dynamic_index_in_dim(pairs_nnL, device, axis=1, keepdims=False)
        begins_nL = _cumsum(arriving_nL, 1) - arriving_nL
        first_nL, end_nL = (jnp.clip(place, low, high) for place in (begins_nL, begins_nL + arriving_nL))
        sizes_nL = end_nL - first_nL
        sorted_nL = (_cumsum(sizes_nL.T.reshape(-1), 0).reshape(E // n, n) - sizes_nL.T).T
        arrived = (
            (slots_n[:, None] + first_nL - low).reshape(-1),
            sizes_nL.reshape(-1),
            sorted_nL.reshape(-1),
        )

        buffer_rows = n * self.pair_rows
        row_of_slot, slot_of_row = _in_slices(buffer_rows, *departing), _in_slices(rows, *departing[::-1])
        place_of_slot, slot_of_place = (
            _in_slices(buffer_rows, *slices) for slices in (arrived, arrived[::-1])
        )

        def dispatch(x_RD):
            x_CD = gather_rows(x_RD, row_of_slot, slot_of_row)
            x_CD = jax.lax.all_to_all(x_CD, "expert", 0, 0, tiled=True)
            return gather_rows(x_CD, slot_of_place, place_of_slot)

        def combine(y_CD):
            y_CD = gather_rows(y_CD, place_of_slot, slot_of_place)
            y_CD = jax.lax.all_to_all(y_CD, "expert", 0, 0, tiled=True)
            return gather_rows(y_CD, slot_of_row, row_of_slot)

        return Round(dispatch, combine, _sum(sizes_nL, 0))


Transport = RaggedAllToAll | PaddedAllToAll


def _in_slices(count: int, begins: jax.Array, sizes: jax.Array, others: jax.Array) -> jax.Array:
    """Maps positions 0 … count - 1 on one side to positions on the other side; -1 outside of all slices."""
    offset = jnp.arange(count, dtype=jnp.int32)[:, None] - begins
    is_inside = (offset >= 0) & (offset < sizes)
    return _sum(jnp.where(is_inside, others + offset + 1, 0), 1) - 1
