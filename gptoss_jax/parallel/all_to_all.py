"""How rows travel to the devices that hold their experts, and back: two transports, one result.

What a device gets depends on the router, up to all rows of all devices. So it has room for a bounded number
at a time, and what is more travels in further rounds, which hardly ever come. How many there are is known to
all devices of the expert axis: each has the counts of all.

Letters: R rows of one device, sorted by expert; C rows that a device has room for; E experts of all devices;
n devices of the expert axis; L = E / n experts of one device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptoss_jax.kernels import backend
from gptoss_jax.kernels.grouped_matmul.api import take

Way = Callable[[jax.Array], jax.Array]
# Row counts and offsets are int32 also where jax_enable_x64 would make sums int64.
_sum = functools.partial(jnp.sum, dtype=jnp.int32)
_cumsum = functools.partial(jnp.cumsum, dtype=jnp.int32)

# Room for the rows that come in one round, in percent of what an even router sends: to a device for the
# ragged transport, from one device to another for the dense one, where fewer rows vary more.
ROOM_PERCENT = {"ragged": 125, "dense": 150}
# Rows that a device has room for at least: in decoding there is one round.
SMALLEST_ROOM = 256


def transport(rows: int, devices: int, local: int, most: int | None = None) -> "Ragged | Dense":
    """The transport for what the program is compiled for.

    Args:
      rows, devices, local: R, n and L.
      most: rows that an expert takes at most; None where there is no limit.
    """
    every = devices * rows if most is None else min(devices * rows, most * local)
    even = {"ragged": rows, "dense": -(-rows // devices)}
    room = {name: -(-size * ROOM_PERCENT[name] // 100) for name, size in even.items()}
    if has_ragged():
        size = min(every, max(room["ragged"], SMALLEST_ROOM)) if most is None else every
        return Ragged(size, most_rounds=-(-every // size))
    size = min(rows, every, max(room["dense"], SMALLEST_ROOM // devices))
    return Dense(size, most_rounds=-(-min(rows, every) // size))


def has_ragged() -> bool:
    """Whether `ragged_all_to_all` exists where the program is to run: on GPUs, and on TPUs but v5e, whose
    slices of more than 16 chips lack it."""
    if backend.platform() == "tpu":
        return not backend.device_kind().startswith(("TPU v5 lite", "TPU v5e"))
    return backend.platform() == "gpu"


@dataclasses.dataclass(frozen=True)
class Ragged:
    """By `ragged_all_to_all`: a slice for each expert, rows land sorted by expert, and no row is padding."""

    # C.
    room: int
    most_rounds: int

    def rounds(self, counts_nE: jax.Array) -> jax.Array:
        """Rounds that the fullest device needs, of `counts_nE` rows of each device for each expert."""
        n, E = counts_nE.shape
        return -(-jnp.max(_sum(counts_nE.reshape(n, n, E // n), (0, 2))) // self.room)

    def ways(self, counts_nE: jax.Array, rows: int, turn: jax.Array | int) -> tuple[Way, Way, jax.Array]:
        """The ways [R, D] -> [C, D] there and [C, D] -> [R, D] back, and the rows each expert here gets.

        All rows that a device gets, in all rounds, lie one expert after another, and within an expert one
        sender after another. Round `turn` brings rows `turn * C` … of that order.
        """
        n, E = counts_nE.shape
        here = jax.lax.axis_index("expert")
        at_sender_nE = _cumsum(counts_nE, 1) - counts_nE
        by_owner = (
            counts_nE.reshape(n, n, E // n).transpose(1, 2, 0).reshape(n, E)
        )  # [owner, (expert, sender)]
        begins = (_cumsum(by_owner, 1) - by_owner).reshape(n, E // n, n)
        begins = begins.transpose(2, 0, 1).reshape(n, E)
        low, high = turn * self.room, (turn + 1) * self.room
        first_nE, end_nE = (jnp.clip(place, low, high) for place in (begins, begins + counts_nE))
        sizes_nE = end_nE - first_nE
        at_sender_nE = at_sender_nE + first_nE - begins
        at_owner_nE = first_nE - low

        def sent(x_nE):  # this device's slices
            return x_nE[here]

        def owned(x_nE):  # all devices' slices for the experts here
            return jax.lax.dynamic_slice_in_dim(x_nE, here * (E // n), E // n, axis=1).reshape(-1)

        there = Slices(sent(at_sender_nE), sent(sizes_nE), sent(at_owner_nE), owned(sizes_nE))
        back = Slices(owned(at_owner_nE), owned(sizes_nE), owned(at_sender_nE), sent(sizes_nE))
        return (
            lambda x_RD: send_slices(x_RD, there, back, self.room),
            lambda y_CD: send_slices(y_CD, back, there, rows),
            _sum(owned(sizes_nE).reshape(n, E // n), 0),
        )


class Slices(NamedTuple):
    """One direction, as `jax.lax.ragged_all_to_all` takes it: E slices of rows, those for or from device 0
    first, one for each expert of the device that has the experts."""

    read_E: jax.Array  # where each slice begins here
    sizes_E: jax.Array  # its rows
    write_E: jax.Array  # where it begins on the device that gets it
    received_E: jax.Array  # rows of the slices that come in


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def send_slices(x_RD: jax.Array, there: Slices, back: Slices, rows: int) -> jax.Array:
    """Sends slices of rows to the devices of the expert axis; [rows, D], zero where nothing arrives.

    `back` is the way the same rows would return: that of the gradient.
    """
    move = ragged_all_to_all if has_ragged() else reference_all_to_all
    return move(x_RD, there, rows)


send_slices.defvjp(
    # Of the rows only their number is kept, in an array without columns.
    lambda x_RD, there, back, rows: (send_slices(x_RD, there, back, rows), (there, back, x_RD[:, :0])),
    lambda rows, kept, g_CD: (send_slices(g_CD, kept[1], kept[0], kept[2].shape[0]), None, None),
)


def ragged_all_to_all(x_RD: jax.Array, slices: Slices, rows: int) -> jax.Array:
    """The collective itself."""
    empty = jnp.zeros((rows, x_RD.shape[1]), x_RD.dtype)
    return jax.lax.ragged_all_to_all(x_RD, empty, *slices, axis_name="expert")


def reference_all_to_all(x_RD: jax.Array, slices: Slices, rows: int) -> jax.Array:
    """The same by collectives that every backend has: each device takes its own of all devices' rows."""
    sources = jax.lax.axis_index("expert") * x_RD.shape[0] + slices.read_E
    x_RD = jax.lax.all_gather(x_RD, "expert", tiled=True)
    read_E, write_E = (
        jax.lax.all_to_all(place, "expert", 0, 0, tiled=True) for place in (sources, slices.write_E)
    )
    return take(x_RD, _in_slices(rows, write_E, slices.received_E, read_E), None)


@dataclasses.dataclass(frozen=True)
class Dense:
    """By `all_to_all`: the same number of rows from each device to each other, those that are not there being
    zero; what arrives is sorted by expert."""

    # Rows from one device to another: C = n * pair.
    pair: int
    most_rounds: int

    def rounds(self, counts_nE: jax.Array) -> jax.Array:
        """Rounds that the pair of devices with the most rows needs."""
        n, E = counts_nE.shape
        return -(-jnp.max(_sum(counts_nE.reshape(n, n, E // n), 2)) // self.pair)

    def ways(self, counts_nE: jax.Array, rows: int, turn: jax.Array | int) -> tuple[Way, Way, jax.Array]:
        """As those of `Ragged`. Round `turn` brings rows `turn * pair` … of each device for each other."""
        n, E = counts_nE.shape
        here = jax.lax.axis_index("expert")
        pairs_nnL = counts_nE.reshape(n, n, E // n)
        low, high = turn * self.pair, (turn + 1) * self.pair
        slots_n = jnp.arange(n, dtype=jnp.int32) * self.pair

        # This device's rows: those for one device lie together.
        counts_n = _sum(pairs_nnL[here], 1)
        starts_n = _cumsum(counts_n, 0) - counts_n
        sent_n = jnp.clip(counts_n - low, 0, self.pair)
        departing = (slots_n, sent_n, starts_n + low)
        # What arrives: from each device in turn the rows of one expert after another; and its sorted order.
        arriving_nL = jax.lax.dynamic_index_in_dim(pairs_nnL, here, axis=1, keepdims=False)
        begins_nL = _cumsum(arriving_nL, 1) - arriving_nL
        first_nL, end_nL = (jnp.clip(place, low, high) for place in (begins_nL, begins_nL + arriving_nL))
        sizes_nL = end_nL - first_nL
        sorted_nL = (_cumsum(sizes_nL.T.reshape(-1), 0).reshape(E // n, n) - sizes_nL.T).T
        arrived = (
            (slots_n[:, None] + first_nL - low).reshape(-1),
            sizes_nL.reshape(-1),
            sorted_nL.reshape(-1),
        )

        room = n * self.pair
        row_of_slot, slot_of_row = _in_slices(room, *departing), _in_slices(rows, *departing[::-1])
        place_of_slot, slot_of_place = _in_slices(room, *arrived), _in_slices(room, *arrived[::-1])

        def there(x_RD):
            x_CD = take(x_RD, row_of_slot, slot_of_row)
            x_CD = jax.lax.all_to_all(x_CD, "expert", 0, 0, tiled=True)
            return take(x_CD, slot_of_place, place_of_slot)

        def back(y_CD):
            y_CD = take(y_CD, place_of_slot, slot_of_place)
            y_CD = jax.lax.all_to_all(y_CD, "expert", 0, 0, tiled=True)
            return take(y_CD, slot_of_row, row_of_slot)

        return there, back, _sum(sizes_nL, 0)


def _in_slices(count: int, begins: jax.Array, sizes: jax.Array, others: jax.Array) -> jax.Array:
    """For places 0 … count - 1 on one side of some slices, where they are on the other; -1 in no slice."""
    into = jnp.arange(count, dtype=jnp.int32)[:, None] - begins
    hit = (into >= 0) & (into < sizes)
    return _sum(jnp.where(hit, others + into + 1, 0), 1) - 1
