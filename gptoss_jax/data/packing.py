"""Packing of documents into rows."""

import bisect
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class PackPlan:
    """Pieces of documents by row: row r has pieces row_offsets[r] to row_offsets[r + 1]."""

    row_offsets: np.ndarray  # int64 [rows + 1]
    document: np.ndarray  # int64 [pieces], index into the packed lengths
    start: np.ndarray  # int64 [pieces], first pair of the piece within its document
    length: np.ndarray  # int32 [pieces], pairs


def pack(lengths: np.ndarray, seq_len: int) -> PackPlan:
    """Packs documents into rows with best-fit decreasing, so that few of them are split.

    A document longer than a row fills whole rows, and its remainder is packed like a short document: from
    long to short, each into the fullest row in which it fits (Ding et al. 2024, "Fewer Truncations Improve
    Language Modeling"). Uses at most 2 * sum(lengths) / seq_len + 1 rows. Deterministic.

    Args:
      lengths: int [documents], (input, target) pairs of each document.
      seq_len: pairs per row.
    """
    lengths = np.asarray(lengths, np.int64)
    full = lengths // seq_len
    row_count = int(full.sum())
    document = [np.repeat(np.arange(len(lengths)), full)]
    start = [(np.arange(row_count) - np.repeat(np.cumsum(full) - full, full)) * seq_len]
    length = [np.full(row_count, seq_len)]
    row = [np.arange(row_count)]

    rest = lengths % seq_len
    order = np.argsort(-rest, kind="stable")[: np.count_nonzero(rest)]
    document.append(order)
    start.append(full[order] * seq_len)
    length.append(rest[order])

    # Open rows by remaining room. Documents of the same length are placed together: the fullest row is still
    # the fullest after adding one, so it is filled before the next row.
    rows_by_room: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    sizes, counts = np.unique(-rest[order], return_counts=True)
    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        while count:
            at = bisect.bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                open_rows = np.concatenate(rows_by_room.pop(room))
            else:
                room = seq_len
                open_rows = np.arange(row_count, row_count + -(-count // (seq_len // size)))
                row_count += len(open_rows)
            each = room // size
            placed = np.repeat(open_rows[: -(-count // each)], each)[:count]
            row.append(placed)
            count -= len(placed)
            filled, last = divmod(len(placed), each)
            for left, some in (
                (room - each * size, open_rows[:filled]),
                (room - last * size, open_rows[filled : filled + 1] if last else open_rows[:0]),
                (room, open_rows[filled + (last > 0) :]),
            ):
                if left and len(some):
                    if left not in rows_by_room:
                        bisect.insort(rooms, left)
                    rows_by_room.setdefault(left, []).append(some)

    row_of_piece = np.concatenate(row)
    by_row = np.argsort(row_of_piece, kind="stable")
    return PackPlan(
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(row_of_piece, minlength=row_count))]),
        document=np.concatenate(document)[by_row],
        start=np.concatenate(start)[by_row],
        length=np.concatenate(length)[by_row].astype(np.int32),
    )
