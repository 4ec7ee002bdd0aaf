"""The expected results of grouped matmul by a loop, and group sizes to test."""

import numpy as np
from hypothesis import strategies as st


def by_loop(x, w, g, sizes):
    """Returns y, dx and dw, computed group by group; zero for rows of no group."""
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], g[rows] @ w[e].T, x[rows].T @ g[rows]
        start += size
    return y, dx, dw


def sizes_within(rows, groups):
    """Group sizes with a sum of at most `rows`, often with zeros and ones among them."""
    cuts = st.lists(st.integers(0, rows), min_size=groups, max_size=groups).map(sorted)
    small = st.lists(st.integers(0, 3), min_size=groups, max_size=groups)
    return cuts.map(lambda c: [c[0], *(b - a for a, b in zip(c, c[1:], strict=False))]) | small
