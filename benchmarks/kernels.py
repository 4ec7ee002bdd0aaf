"""Kernels against their plain references, float32 on CPU: python benchmarks/kernels.py [--only PART ...].

grouped: the experts' grouped matmul, forward and backward, 2,048 tokens x top-4 with uneven groups. The limit
is the matmul peak of the same run (2,048^3, alternating with the rest). 128 experts may take 1.5 times as
long as 8, because the work is the same. On CPU `lax.ragged_dot` multiplies every row by every expert's
matrix, so it runs only for 8. Error: against float64 in numpy.

attention: forward and backward, with sinks, a sliding and a full layer. FLOPs are those of the visible pairs,
two matmuls forward and five backward. Error: against the plain softmax with the whole score matrix, which
runs up to 2,048 tokens.

loss: peak memory of the loss and its gradients with gpt-oss's vocabulary, in chunks and with all logits at
once, each in a separate process: peak resident bytes minus those before. The difference must be at least one
array of logits.

Errors are the largest difference over the largest value of an array, for the worst array. Shows medians
(min–max); writes results/kernels.json (with --only: kernels-PARTS.json).
"""

import functools

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import PEAK, percent, spread, with_gradients
from loss_memory import loss

from gptoss_jax.kernels.attention.api import AttentionSpec, attention_mask, reference_attention
from gptoss_jax.kernels.attention.api import attention as chosen_attention
from gptoss_jax.kernels.attention.blockwise import blockwise_attention
from gptoss_jax.kernels.cpu import build
from gptoss_jax.kernels.cpu.grouped import cpu_grouped_matmul
from gptoss_jax.kernels.grouped_matmul.api import reference_grouped_matmul
from gptoss_jax.kernels.grouped_matmul.xla import xla_grouped_matmul


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def grouped(rounds: int, quick: bool) -> dict:
    R, D, F = (256, 384, 1920) if quick else (2048 * 4, 384, 1920)
    counts = (8, 32) if quick else (8, 32, 128)
    x_RD, g_RF = _normal(0, R, D), _normal(1, R, F)
    calls, errors = {PEAK: common.square_matmul()}, {}
    for E in counts:
        sizes, w_EDF = common.uneven_sizes(R, E), _normal(2, E, D, F) * D**-0.5
        forms = {"XLA": xla_grouped_matmul}
        if build.is_available():
            forms = {"C++": cpu_grouped_matmul} | forms
        if E <= 8:
            forms["ragged_dot"] = reference_grouped_matmul
        expected = _grouped_float64(x_RD, w_EDF, g_RF, sizes)
        for form, function in forms.items():
            call = functools.partial(with_gradients(function), g_RF, (x_RD, w_EDF), (jnp.asarray(sizes),))
            calls[E, form], errors[E, form] = call, common.largest_error(call(), expected)
    seconds, flops = common.alternate(calls, rounds), 6 * R * D * F
    peak, rows = common.flops_per_second(seconds.pop(PEAK)), []
    for (E, form), values in seconds.items():
        row = {"E": E, "form": form, "seconds": spread(values), "error": errors[E, form]}
        row |= {"largest_of_mean": float(common.uneven_sizes(R, E).max() * E / R)}
        rows.append(row | {"of_peak": flops / row["seconds"]["median"] / peak["median"]})
    common.print_table(
        f"Grouped matmul: {R} rows, D {D}, F {F}; matmul peak {peak['median'] / 1e9:,.0f} GFLOP/s",
        ("E, form", "ms", "of the peak", "error", "largest group / mean"),
        [
            (f"{row['E']}, {row['form']}", common.milliseconds(row["seconds"]), percent(row["of_peak"]),
             f"{row['error']:.1e}", f"{row['largest_of_mean']:.1f}")
            for row in rows
        ],
    )  # fmt: skip
    medians, most = {(row["E"], row["form"]): row["seconds"]["median"] for row in rows}, counts[-1]
    bounds = [
        common.bounded(f"{form}: time at E={most} / time at E=8", medians[most, form] / medians[8, form], 1.5)
        for E, form in medians
        if most == E
    ]
    return {"R": R, "D": D, "F": F, "flops": flops, "peak": peak, "rows": rows, "bounds": bounds}


def _grouped_float64(x_RD, w_EDF, g_RF, sizes):
    """Returns (y, (dx, dw))."""
    x_RD, w_EDF, g_RF = (np.asarray(a, np.float64) for a in (x_RD, w_EDF, g_RF))
    parts = [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
    y_RF = np.concatenate([x_RD[part] @ w for part, w in zip(parts, w_EDF, strict=True)])
    dx_RD = np.concatenate([g_RF[part] @ w.T for part, w in zip(parts, w_EDF, strict=True)])
    return y_RF, (dx_RD, np.stack([x_RD[part].T @ g_RF[part] for part in parts]))


def attention(rounds: int, quick: bool) -> dict:
    B, N, K, H = 1, 6, 2, 64
    calls, errors = {PEAK: common.square_matmul()}, {}
    for T in (512,) if quick else (512, 1024, 2048, 4096):
        shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (N,))
        arguments, g = tuple(_normal(i, *shape) for i, shape in enumerate(shapes)), _normal(4, B, T, N, H)
        positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
        places = (jnp.ones_like(positions_BT), positions_BT)
        for window in (128, None):
            spec = AttentionSpec(window)

            def blocks(q, k, v, sinks, *places, attend=blockwise_attention, spec=spec):
                return attend(q, k, v, *places, spec, sinks_N=sinks)

            def plain(q, k, v, sinks, *places, spec=spec):
                return reference_attention(q, k, v, attention_mask(*places, spec), sinks_N=sinks)

            forms = {"chosen": functools.partial(blocks, attend=chosen_attention), "blocks": blocks}
            expected, key = None, ("full" if window is None else f"window {window}", T)
            if T <= 2048:
                forms["plain"] = plain
                expected = with_gradients(plain)(g, arguments, places)
            for form, function in forms.items():
                calls[*key, form] = functools.partial(with_gradients(function), g, arguments, places)
                if expected is not None and form != "plain":
                    errors[*key, form] = common.largest_error(calls[*key, form](), expected)
    seconds = common.alternate(calls, rounds)
    peak, rows = common.flops_per_second(seconds.pop(PEAK)), []
    for (layer, T, form), values in seconds.items():
        most = T if layer == "full" else min(T, 128)
        flops = 7 * 2 * H * B * N * (most * (most + 1) // 2 + (T - most) * most)
        row = {"layer": layer, "T": T, "form": form, "seconds": spread(values)}
        row |= {"error": errors.get((layer, T, form)), "flops": flops}
        rows.append(row | {"of_peak": flops / row["seconds"]["median"] / peak["median"]})
    medians = {(row["layer"], row["T"], row["form"]): row["seconds"]["median"] for row in rows}
    for row in rows:
        reference = medians.get((row["layer"], row["T"], "plain"))
        row["times_as_fast"] = reference and reference / row["seconds"]["median"]
    common.print_table(
        f"Attention: {N} query, {K} key/value heads of {H}; matmul peak {peak['median'] / 1e9:,.0f} GFLOP/s",
        ("layer, T, form", "ms", "plain / this", "of the peak", "error"),
        [
            (f"{row['layer']}, {row['T']}, {row['form']}", common.milliseconds(row["seconds"]),
             row["times_as_fast"] and f"{row['times_as_fast']:.2f}", percent(row["of_peak"]),
             None if row["error"] is None else f"{row['error']:.1e}")
            for row in rows
        ],
    )  # fmt: skip
    return {"B": B, "N": N, "K": K, "H": H, "peak": peak, "rows": rows}


PARTS = {"grouped": grouped, "attention": attention, "loss": loss}


def make_parser():
    parser = common.base_parser(__doc__, rounds=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    return parser


def main() -> None:
    options = make_parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    names = options.only or list(PARTS)
    record = {"settings": {"rounds": options.rounds}}
    record |= {name: PARTS[name](options.rounds, options.quick) for name in names}
    if not options.quick:
        print(common.write_json("-".join(["kernels", *(options.only or ())]), record))


if __name__ == "__main__":
    common.keep_memory()
    main()
