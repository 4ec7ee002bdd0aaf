"""Packing of documents into rows, against a simple best fit."""

import collections
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.data.packing import pack


def rows_of(plan):
    pieces = list(zip(plan.document.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
    return [
        pieces[first:last] for first, last in zip(plan.row_offsets[:-1], plan.row_offsets[1:], strict=True)
    ]


def test_pack_by_hand():
    # 23 = 2 * 10 + 3. In decreasing order: 7 and 6 open rows, 4 fits the second, 3 the first, 2 neither.
    plan = pack(np.array([2, 23, 4, 0, 6, 7]), 10)
    assert rows_of(plan) == [
        [(1, 0, 10)],
        [(1, 10, 10)],
        [(5, 0, 7), (1, 20, 3)],
        [(4, 0, 6), (2, 0, 4)],
        [(0, 0, 2)],
    ]
    assert rows_of(pack(np.array([], np.int64), 10)) == []


def best_fit_decreasing(sizes, seq_len):
    """Returns the free space of each row, placing one document at a time."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else seq_len) - size)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 70), max_size=80), st.integers(2, 40))
def test_every_pair_is_packed_once(lengths, seq_len):
    plan = pack(np.array(lengths, np.int64), seq_len)
    rows = rows_of(plan)
    pairs = collections.Counter(
        (document, pair) for row in rows for document, start, n in row for pair in range(start, start + n)
    )
    assert pairs == {(i, pair): 1 for i, n in enumerate(lengths) for pair in range(n)}
    used = [sum(n for _, _, n in row) for row in rows]
    assert all(0 < n <= seq_len for n in used)
    assert len(rows) <= 2 * sum(lengths) / seq_len + 1
    # Documents that fit a row are not split.
    assert all(
        n == min(lengths[i], seq_len) or start + n == lengths[i] for row in rows for i, start, n in row
    )
    cut = [n % seq_len for n in lengths if n % seq_len]
    whole = sum(n // seq_len for n in lengths)
    assert sorted(seq_len - n for n in used) == sorted([0] * whole + best_fit_decreasing(cut, seq_len))
    again = pack(np.array(lengths, np.int64), seq_len)
    assert all(np.array_equal(a, b) for a, b in zip(vars(plan).values(), vars(again).values(), strict=True))


def test_pack_many_documents():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(4, 1, 300_000)).astype(np.int64)
    start = time.monotonic()
    plan = pack(lengths, 512)
    assert time.monotonic() - start < 5
    rows = len(plan.row_offsets) - 1
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (rows * 512) > 0.999
