"""Sections of gpu.py: attention and grouped matmul against other implementations and the limits."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from common import milliseconds, percent, print_table, uneven_sizes, with_gradients
from gpu_run import Run

from gptoss_jax.kernels.attention import api
from gptoss_jax.kernels.grouped_matmul.api import reference_grouped_matmul
from gptoss_jax.kernels.grouped_matmul.pallas_triton import WIDE, Blocks, triton_grouped_matmul

OURS, BLOCKWISE, CUDNN = "ours", "XLA blockwise", "cuDNN, no sinks"
# Block sizes of the grouped matmul that compile for an H100 without spilling registers.
BLOCKS = (
    WIDE,
    Blocks(128, 256, 64, warps=8, stages=3),
    Blocks(256, 128, 64, warps=8, stages=3),
    Blocks(128, 128, 64, warps=4, stages=3),
    Blocks(128, 128, 32, warps=4, stages=4),
)


# Attention


def _attention_forms(run: Run, window: int | None) -> dict:
    """Returns functions of (q, k, v, sinks, segments, positions) by name."""
    # Imported here, so that a missing module fails only this section.
    from gptoss_jax.kernels.attention.blockwise import blockwise_attention

    def with_sinks(attend):
        spec = api.AttentionSpec(window)
        return lambda q, k, v, sinks, *places: attend(q, k, v, *places, spec, sinks_N=sinks)

    def cudnn(q, k, v, *_):
        # cuDNN's window does not count the query's own key.
        near = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=near, implementation="cudnn"
        )

    forms = {OURS: with_sinks(api.attention), BLOCKWISE: with_sinks(blockwise_attention)}
    return forms if run.smoke else forms | {CUDNN: cudnn}


def _attention_inputs(B, T, N, K, H, dtype):
    """Returns (q, k, v, sinks), the cotangent, and (segments, positions) of one document per row."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    q, k, v, g = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=False))
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return (q, k, v, jax.random.normal(keys[4], (N,))), g, (jnp.ones_like(positions_BT), positions_BT)


def attention(run: Run) -> dict:
    """Measures attention in bfloat16 with the heads of gpt-oss, one document per row. FLOPs count only
    visible pairs: two matmuls forward, five backward. The limit is the slower of these at the matmul peak and
    of reading and writing each array once."""
    if run.smoke:
        run.skip(CUDNN, "needs a GPU")
    B, N, K, H = (2, 4, 2, 16) if run.smoke else (4, 64, 8, 64)
    lengths, windows = ((48,), (16, None)) if run.smoke else ((4096, 16384), (128, None))
    record = {"shape": {"B": B, "N": N, "K": K, "H": H}, "exactness": [], "rows": []}
    for window in windows:
        record["exactness"] += (
            run.attempt(f"exactness, window {window}", _attention_exactness, run, N, K, H, window) or []
        )
    for T in lengths:
        arguments, g, places = _attention_inputs(B, T, N, K, H, jnp.bfloat16)
        for window in windows:
            forms = _attention_forms(run, window)
            near = min(window or T, T)
            pairs = B * N * (near * (near + 1) / 2 + (T - near) * near)
            for what, matmuls, passes in (("forward", 2, 1), ("forward + backward", 7, 3)):
                calls = {}
                for form, function in forms.items():
                    if passes == 1:
                        calls[form] = functools.partial(jax.jit(function), *arguments, *places)
                    else:
                        calls[form] = functools.partial(with_gradients(function), g, arguments, places)
                flops = 2 * matmuls * H * pairs
                moved = passes * 2 * B * T * H * (2 * N + 2 * K)
                limit = max(flops / run.peak, moved / run.bandwidth)
                found = run.compare(f"attention T {T} window {window} {what}", calls)
                for form, seconds in found.items():
                    record["rows"].append(
                        {"T": T, "window": window, "pass": what, "form": form, "seconds": seconds}
                        | {"flops": flops, "limit_seconds": limit, "of_limit": limit / seconds["median"]}
                    )
    print_table(
        "Attention: largest difference from float32",
        ("window, form", "out", "dq", "dk", "dv", "dsinks"),
        [
            (
                f"{row['window']}, {row['form']}",
                *(f"{row[n]:.1e}" for n in ("out", "dq", "dk", "dv", "dsinks")),
            )
            for row in record["exactness"]
        ],
    )
    print_table(
        f"Attention: B {B}, N {N}, K {K}, H {H}, bfloat16",
        ("T, window, pass, form", "ms", "TFLOP/s", "of the limit"),
        [
            (
                f"{row['T']}, {row['window']}, {row['pass']}, {row['form']}",
                milliseconds(row["seconds"]),
                f"{row['flops'] / row['seconds']['median'] / 1e12:.1f}",
                percent(row["of_limit"]),
            )
            for row in record["rows"]
        ],
    )
    return record


def _attention_exactness(run: Run, N, K, H, window) -> list[dict]:
    """Returns the largest difference of the output and of each gradient from plain softmax in float32."""
    T = 48 if run.smoke else 1024
    arguments, g, places = _attention_inputs(1, T, N, K, H, jnp.bfloat16)
    mask_BTS = api.attention_mask(*places, api.AttentionSpec(window))

    def plain(q, k, v, sinks):
        return api.reference_attention(q, k, v, mask_BTS, sinks_N=sinks)

    wide = [jax.tree.map(lambda a: a.astype(jnp.float32), a) for a in (g, arguments)]
    expected = with_gradients(plain)(*wide)
    without_sinks = with_gradients(lambda q, k, v, sinks: plain(q, k, v, None))(*wide)
    rows = []
    for form, function in _attention_forms(run, window).items():
        found = run.attempt(f"exactness, {form}", with_gradients(function), g, arguments, places)
        if found is not None:
            differences = jax.tree.map(
                lambda f, e: float(jnp.max(jnp.abs(f.astype(jnp.float32) - e))),
                found,
                without_sinks if form == CUDNN else expected,
            )
            out, gradients = differences
            rows.append({"window": window, "form": form, "out": out})
            rows[-1] |= dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=True))
    return rows


# Grouped matmul


def _grouped_forms(run: Run) -> dict:
    """Returns functions of (x, w, group sizes) by name."""
    forms = {"triton": functools.partial(triton_grouped_matmul, interpret=run.smoke)}
    forms["XLA ragged_dot"] = reference_grouped_matmul
    if run.smoke:
        run.skip("tokamax", "needs a GPU")
    elif importlib.util.find_spec("tokamax") is None:
        run.skip("tokamax", "not installed; pip install tokamax")
    else:
        import tokamax

        for name in ("mosaic", "triton"):
            forms[f"tokamax {name}"] = functools.partial(tokamax.ragged_dot, implementation=name)
    return forms


def grouped(run: Run) -> dict:
    """Measures the grouped matmul in bfloat16, forward and backward, with uneven groups, against the peak."""
    R, D, F = (96, 48, 40) if run.smoke else (16384 * 4, 2880, 2880)
    flops = 3 * 2 * R * D * F
    record = {"shape": {"R": R, "D": D, "F": F}, "flops": flops}
    record["exactness"] = run.attempt("grouped, exactness", _grouped_exactness, run)
    record["rows"], record["blocks"] = [], []
    forms = _grouped_forms(run)
    x, g = (jax.random.normal(jax.random.key(i), (R, n), jnp.bfloat16) for i, n in ((0, D), (1, F)))
    for E in (4,) if run.smoke else (32, 128):
        sizes = uneven_sizes(R, E)
        w = jax.random.normal(jax.random.key(2), (E, D, F), jnp.bfloat16) * D**-0.5
        on_device = jnp.asarray(sizes)

        def call(function, w=w, on_device=on_device):
            return functools.partial(with_gradients(function), g, (x, w), (on_device,))

        calls = {name: call(function) for name, function in forms.items()}
        calls["dense, one matrix"] = functools.partial(with_gradients(jnp.matmul), g, (x, w[0]))
        uneven = float(sizes.max() / sizes.mean())
        for form, seconds in run.compare(f"grouped E {E}", calls).items():
            record["rows"].append({"E": E, "largest_of_mean": uneven, "form": form, "seconds": seconds})
        if E == 32:
            calls = {
                str(blocks): call(functools.partial(triton_grouped_matmul, blocks=blocks))
                for blocks in BLOCKS
            }
            for blocks, seconds in run.compare("grouped blocks", calls).items():
                record["blocks"].append({"E": E, "form": blocks, "seconds": seconds})
    for title, rows in (("", record["rows"]), (", by blocks", record["blocks"])):
        if rows:
            print_table(
                f"Grouped matmul{title}: {R} rows, D {D}, F {F}, bfloat16, forward + backward",
                ("E, form", "ms", "TFLOP/s", "of the matmul peak"),
                [
                    (
                        f"{row['E']}, {row['form']}",
                        milliseconds(row["seconds"]),
                        f"{flops / row['seconds']['median'] / 1e12:.1f}",
                        percent(flops / row["seconds"]["median"] / run.peak),
                    )
                    for row in rows
                ],
            )
    return record


def _grouped_exactness(run: Run) -> dict:
    """Returns the largest difference of y, dx and dw from float64, over the largest value, with NaN in the
    rows past the groups."""
    E, D, F = (3, 40, 24) if run.smoke else (5, 2880, 1000)
    sizes = np.array([70, 0, 9, 0, 300][:E], np.int32)
    R, total = int(sizes.sum()) + 11, int(sizes.sum())
    rng = np.random.default_rng(0)
    ours, found = functools.partial(triton_grouped_matmul, interpret=run.smoke), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        x, w, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((R, D), (E, D, F), (R, F)))
        x, g = x.at[total:].set(jnp.nan), g.at[total:].set(jnp.nan)
        y, (dx, dw) = with_gradients(ours)(g, (x, w), (jnp.asarray(sizes),))
        x, w, g = (np.asarray(a, np.float64) for a in (x, w, g))
        expected = [np.zeros((R, F)), np.zeros((R, D)), np.zeros((E, D, F))]
        for e, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
            rows = slice(end - size, end)
            expected[0][rows], expected[1][rows] = x[rows] @ w[e], g[rows] @ w[e].T
            expected[2][e] = x[rows].T @ g[rows]
        for name, one, other in zip(("y", "dx", "dw"), (y, dx, dw), expected, strict=True):
            error = np.max(np.abs(np.asarray(one, np.float64) - other)) / np.max(np.abs(other))
            found[f"{name} {jnp.dtype(dtype).name}"] = float(error)
            limit = 1e-5 if dtype == jnp.float32 else 1e-2
            if not error < limit:
                raise AssertionError(
                    f"{name} in {jnp.dtype(dtype).name} is off by {error:.1e} of the largest"
                )
    print_table(
        "Grouped matmul: largest difference from float64, of the largest value",
        ("", *found),
        [("triton", *(f"{error:.1e}" for error in found.values()))],
    )
    return found
