"""The picture of a run: `draw_report` turns metrics.jsonl into report.png."""

import math
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_path, user_text
from gptoss_jax.hardware import parameter_counts
from gptoss_jax.training.console import format_count, format_rate, printable, read_metrics

# Inches and dots per inch: 1600 x 1000 pixels.
_SIZE, _DPI = (16.0, 10.0), 100
_TRAIN, _HELD_OUT, _RED = "#2f6db5", "#e07b00", "#c62f2d"
_TEXT, _MUTED, _LINE = "#22262b", "#6d747d", "#d9dde2"
# Most columns and rows of the heat map: about the pixels there are for it.
_MOST_COLUMNS, _MOST_ROWS = 440, 396

Rows = Sequence[dict[str, Any]]


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the key, null as NaN; both float64 [number of rows]."""
    pairs = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over the fiftieth part of the run around each row, without NaNs; NaN where there is nothing
    else.
    """
    width = max(len(values) // 50, 1)
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    number = count[last] - count[first]
    return np.where(number > 0, (total[last] - total[first]) / np.maximum(number, 1), math.nan)


def _dress(axes: Axes, title: str, steps: tuple[float, float], x_labels: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, color=_TEXT, fontweight="bold", pad=7)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    axes.tick_params(colors=_MUTED, labelsize=9.5, length=0, which="both", labelbottom=x_labels)
    axes.set_xlim(*steps)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if x_labels:
        axes.set_xlabel("step", fontsize=10, color=_MUTED)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_MUTED, fontsize=11)
    axes.yaxis.set_major_locator(NullLocator())


def _log_scale(axes: Axes, values: np.ndarray, factor: float) -> None:
    """A logarithmic y axis with plain numbers, where the values are positive and span `factor` or more."""
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or values.max() < factor * values.min():
        return
    low, high = values.min() / 1.06, values.max() * 1.06
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1,)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) <= 9:
            break
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str | None = None) -> None:
    """Every row faintly, their running mean on top; a dot where a single row is all there is."""
    known = np.isfinite(values).sum()
    if not known:
        return _say_empty(axes, "no training step yet")
    marker = "o" if known == 1 else ""
    axes.plot(steps, values, color=_TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(values), color=_TRAIN, linewidth=1.8, marker=marker, label=label)


def _dots(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """Evaluations. Not clipped, because the last one lies on the edge."""
    style = dict(marker="o", markersize=5, linewidth=1.3, clip_on=False, zorder=3)
    axes.plot(steps, values, color=_HELD_OUT, label=label, **style)


def _draw_loss(axes: Axes, training: Rows, evaluations: Rows) -> None:
    steps, values = _series(training, "loss")
    val_steps, val_values = _series(evaluations, "val_loss")
    _curve(axes, steps, values, label="training, smoothed")
    if len(val_steps):
        _dots(axes, val_steps, val_values, label="held-out")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=10, labelcolor=_TEXT, loc="upper right", handlelength=2.4)
    _log_scale(axes, np.concatenate([values, val_values]), factor=2.0)


def _draw_bits(axes: Axes, evaluations: Rows) -> None:
    steps, values = _series(evaluations, "val_bits_per_byte")
    if not np.isfinite(values).any():
        return _say_empty(axes, "no evaluation yet")
    latest = values[np.isfinite(values)][-1]
    _dots(axes, steps, values, label=f"this model  {latest:.2f}")
    levels = [latest]
    for key, label, dashes in (("gzip", "gzip -9", (6, 3)), ("xz", "xz -9", (1.5, 2))):
        given = [row[f"{key}_bits_per_byte"] for row in evaluations if row.get(f"{key}_bits_per_byte")]
        for level in given[-1:]:
            style = dict(linestyle=(0, dashes), linewidth=1.3, label=f"{label}  {level:.2f}")
            axes.axhline(level, color=_MUTED, **style)
            levels.append(level)
    axes.legend(frameon=False, fontsize=9.5, labelcolor=_TEXT, loc="best", handlelength=2.4)
    _log_scale(axes, np.concatenate([values, levels]), factor=2.0)


def _draw_rate(axes: Axes, training: Rows) -> None:
    steps, values = _series(training, "learning_rate")
    if not np.isfinite(values).any():
        return _say_empty(axes, "no training step yet")
    # Not smoothed: the corners of a schedule are what one looks for.
    axes.plot(steps, values, color=_TRAIN, linewidth=1.8, marker="o" if len(steps) == 1 else "")
    axes.set_ylim(0, 1.1 * np.nanmax(values) or 1)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value)))


def _draw_gradient(axes: Axes, training: Rows, max_grad_norm: float) -> None:
    steps, values = _series(training, "grad_norm")
    _curve(axes, steps, values)
    _log_scale(axes, values, factor=6.0)
    low, high = axes.get_ylim()
    if low < max_grad_norm < high:
        axes.axhline(max_grad_norm, color=_MUTED, linestyle=(0, (5, 3)), linewidth=1.1)
    # `skipped_steps` counts up over the run, so a row with more than the row before has skipped steps
    # behind it.
    counts = [row.get("skipped_steps") or 0 for row in training]
    rises = [after > before for before, after in zip([0, *counts], counts, strict=False)]
    unfinite = [any(row.get(key, 0) is None for key in ("loss", "grad_norm")) for row in training]
    bad = [row["step"] for row, rise, lost in zip(training, rises, unfinite, strict=True) if rise or lost]
    if bad:
        axes.plot(bad, [0.94] * len(bad), "x", color=_RED, markersize=7, transform=axes.get_xaxis_transform())
        label = f"× not finite, skipped: {max(max(counts), len(bad))}"
        axes.set_title(label, loc="right", fontsize=9.5, color=_RED, pad=7)
    elif low < max_grad_norm < high:
        axes.set_title("dashed: clipped above", loc="right", fontsize=9.5, color=_MUTED, pad=7)


def _draw_speed(axes: Axes, training: Rows) -> None:
    steps, values = _series(training, "tokens_per_second")
    _curve(axes, steps, values)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    known = values[np.isfinite(values)]
    if len(known):
        axes.set_ylim(0, 1.15 * max(np.percentile(known, 99), 1e-9))
    shares = [row["mfu"] for row in training if row.get("mfu") is not None]
    if shares:
        label = f"median MFU {np.median(shares):.1%}"
        axes.set_title(label, loc="right", fontsize=9.5, color=_MUTED, pad=7)


def load_grid(rows: Rows) -> tuple[np.ndarray, np.ndarray, int]:
    """Expert load as a picture: `(grid, steps, together)`.

    `grid` is float32 [L, rows of a layer, columns], in units of the uniform share 1/E. Its columns are
    equal spans from the first to the last of `steps`, those of the rows with a load; a span holds the mean
    of its rows, or what the span before holds if it has none. Where there are more experts than pixels,
    each row of the grid shows the one of `together` neighbours that is furthest from uniform, so that no
    expert that has died or taken over can hide in an average. All are empty if no row has a load.
    """
    loads = [
        (row["step"], np.array(row["expert_load"], np.float32)) for row in rows if row.get("expert_load")
    ]
    loads = [(step, load_LE) for step, load_LE in loads if np.isfinite(load_LE).all()]
    if not loads:
        return np.empty((0, 0, 0), np.float32), np.empty(0), 0
    layers, experts = loads[-1][1].shape
    steps = np.array([step for step, _ in loads], float)
    columns = min(len(loads), _MOST_COLUMNS)
    place = (steps - steps[0]) / max(steps[-1] - steps[0], 1) * columns
    place = np.minimum(place, columns - 1).astype(int)
    grid_CLE = np.zeros((columns, layers, experts), np.float32)
    for column in range(columns):
        inside = [loads[i][1] for i in np.flatnonzero(place == column)]
        grid_CLE[column] = np.mean(inside, axis=0) * experts if inside else grid_CLE[column - 1]

    together = math.ceil(experts / max(_MOST_ROWS // layers, 1))
    groups = [grid_CLE[:, :, first : first + together] for first in range(0, experts, together)]
    furthest = [np.argmax(np.abs(group - 1), axis=2, keepdims=True) for group in groups]
    picked = [np.take_along_axis(group, at, axis=2) for group, at in zip(groups, furthest, strict=True)]
    return np.concatenate(picked, axis=2).transpose(1, 2, 0), steps, together


def _draw_load(figure: Figure, axes: Axes, training: Rows) -> None:
    grid, steps, together = load_grid(training)
    if not grid.size:
        return _say_empty(axes, "no expert load recorded")
    layers, rows, columns = grid.shape
    top = max(2.0, math.ceil(np.percentile(grid, 99.5) * 2) / 2)
    start, end = (steps[0], steps[-1]) if columns > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    image = axes.imshow(
        grid.reshape(layers * rows, columns), cmap="RdBu_r", norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top),
        aspect="auto", interpolation="nearest", extent=(start, end, layers, 0),
    )  # fmt: skip
    axes.grid(False)
    axes.hlines(np.arange(1, layers), start, end, color="white", linewidth=1.6 if layers <= 16 else 0.6)
    labelled = range(0, layers, math.ceil(layers / 12))
    axes.set_yticks([layer + 0.5 for layer in labelled], [str(layer) for layer in labelled])
    axes.set_ylabel("layer", fontsize=10, color=_MUTED)
    note = "one row for each expert" if together == 1 else f"each row: the least even of {together} experts"
    axes.set_title(note, loc="right", fontsize=9.5, color=_MUTED, pad=7)

    bar = figure.colorbar(image, cax=axes.inset_axes((1.015, 0, 0.018, 1)), extend="max")
    bar.set_label("× uniform share", fontsize=10, color=_MUTED)
    bar.set_ticks([0, 0.5, 1, *np.unique(np.round(np.linspace(1, top, 4)[1:] * 2) / 2)])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.tick_params(colors=_MUTED, labelsize=9.5, length=0)
    bar.outline.set_visible(False)


def _title(run: pathlib.Path, config: TrainConfig, training: Rows, evaluations: Rows) -> tuple[str, str]:
    total, active = parameter_counts(config.model)
    facts = [f"{format_count(total)} parameters ({format_count(active)} active)"]
    tokens = next((row["tokens_seen"] for row in reversed(training) if row.get("tokens_seen")), None)
    if tokens:
        facts.append(f"{format_count(tokens)} tokens seen")
    finals = [row for row in evaluations if row.get("final")]
    best = [row for row in finals or evaluations if row.get("val_bits_per_byte") is not None]
    if best:
        word = "final" if finals else f"at step {best[-1]['step']:,}"
        facts.append(f"{best[-1]['val_bits_per_byte']:.3f} bits per byte held-out ({word})")
    return printable(user_text(run.resolve().name)).replace("\n", " "), "  ·  ".join(facts)


def draw_report(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Draws `run_dir/report.png` (1600 x 1000) from its metrics.jsonl and config.json, and returns its path.

    Loss in nats per token, bits per byte of held-out text, learning rate, gradient norm, speed, and the
    share of assignments that every expert of every layer receives. Any part may be missing from the rows.
    An older picture is replaced at once, so a reader never sees half of one. Raises ValueError for a bad
    config or metrics file and FileNotFoundError if there are no metrics.
    """
    run = user_path(run_dir, "run")
    config = TrainConfig.load(run / "config.json")
    rows = read_metrics(run / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    # By step, because the final evaluation may follow an ordinary one of the same step, and counts more.
    evaluations = list({row["step"]: row for row in rows if "val_loss" in row}.values())
    seen = [row["step"] for row in rows] or [0, 1]
    steps = (min(seen), max(seen)) if max(seen) > min(seen) else (seen[0] - 0.5, seen[0] + 0.5)

    # The object-oriented interface only: pyplot would keep global state and could pick a windowed backend.
    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    left = figure.add_gridspec(2, 1, left=0.045, right=0.565, top=0.88, bottom=0.06, hspace=0.17)
    right = figure.add_gridspec(4, 1, left=0.675, right=0.98, top=0.88, bottom=0.06, hspace=0.34)
    loss, load = (figure.add_subplot(cell) for cell in left)
    bits, rate, gradient, speed = (figure.add_subplot(cell) for cell in right)

    _dress(loss, "Loss (nats per token)", steps)
    _dress(load, "Expert load", steps, x_labels=True)
    _dress(bits, "Bits per byte, held-out text", steps)
    _dress(rate, "Learning rate", steps)
    _dress(gradient, "Gradient norm", steps)
    _dress(speed, "Tokens per second", steps, x_labels=True)
    _draw_loss(loss, training, evaluations)
    _draw_load(figure, load, training)
    _draw_bits(bits, evaluations)
    _draw_rate(rate, training)
    _draw_gradient(gradient, training, config.optim.max_grad_norm)
    _draw_speed(speed, training)

    name, facts = _title(run, config, training, evaluations)
    # A folder's name may hold a dollar sign, which would otherwise begin a formula.
    figure.text(0.045, 0.955, name, fontsize=18, fontweight="bold", color=_TEXT, parse_math=False)
    figure.text(0.045, 0.927, facts, fontsize=11.5, color=_MUTED)

    temporary, path = run / "report.png.tmp", run / "report.png"
    with warnings.catch_warnings():
        # The name of a folder may be in a script that the font does not have.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=_DPI)
    os.replace(temporary, path)
    return path
