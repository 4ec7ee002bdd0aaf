"""The plots of a run: `draw_report` turns metrics.jsonl into report.png."""

import math
import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from gptoss_jax.config import TrainConfig
from gptoss_jax.config.paths import user_path, user_text
from gptoss_jax.hardware import parameter_counts
from gptoss_jax.terminal import format_count, format_rate, printable
from gptoss_jax.training.metrics import read_metrics

BLUE, ORANGE, RED, TEXT, MUTED, LINE = "#2f6db5", "#e07b00", "#c62f2d", "#22262b", "#6d747d", "#d9dde2"
STYLE: dict[Any, Any] = {
    "figure.figsize": (16, 10), "figure.dpi": 100, "figure.facecolor": "white",
    "axes.titlelocation": "left", "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlecolor": TEXT,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": LINE, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "xtick.labelsize": 9.5, "xtick.major.size": 0,
    "ytick.color": MUTED, "ytick.labelsize": 9.5, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 9.5, "legend.labelcolor": TEXT, "legend.handlelength": 2.4,
    "lines.linewidth": 1.8,
}  # fmt: skip
# Titles of the first plots, by objective.
TITLES = {
    "lm": ("Loss (nats per token)", "Bits per byte, held-out text", "Learning rate"),
    "dpo": ("Loss (per pair)", "Chosen answers preferred, held-out", "Learning rate"),
    "grpo": ("Reward (mean per answer)", "Tokens per answer", "Entropy (nats per token)"),
}
VAL_ACCURACY = "val_rewards/accuracies"  # of preferences
MAX_LOAD_ROWS = 396  # of the heat map: about its height in pixels

Rows = Sequence[dict[str, Any]]


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the key, null as NaN; both float64 [number of rows]."""
    pairs = [(row["step"], math.nan if row[key] is None else row[key]) for row in rows if key in row]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average of a series, without NaNs; float64 [n].

    It averages over about a twenty-fifth of the series, and over fewer values near its start, where a loss
    falls fastest. It looks only backward, so that its end is as smooth as the rest.
    """
    average, averages = math.nan, []
    for count, value in enumerate(values, start=1):
        if math.isnan(average):
            average = value
        elif math.isfinite(value):
            average += (value - average) / max(1.0, min(count / 8, len(values) / 25))
        averages.append(average)
    return np.array(averages, float)


def typical_range(values: np.ndarray, shown: np.ndarray) -> tuple[float, float] | None:
    """Returns a y range with all of `shown`, but without the outliers of `values`; None if there are none."""
    values, shown = (array[np.isfinite(array)] for array in (values, shown))
    if not len(values) + len(shown):
        return None
    bounds = np.append(shown, np.percentile(values, (2, 98)) if len(values) else [])
    return float(bounds.min()), float(bounds.max())


def _note(axes: Axes, text: str, color: str = MUTED) -> None:
    axes.set_title(text, loc="right", fontsize=9.5, fontweight="normal", color=color)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED, fontsize=11)
    axes.yaxis.set_major_locator(NullLocator())


def _set_range(axes: Axes, bounds: tuple[float, float] | None, log_factor: float) -> None:
    """Sets the range of the y axis, logarithmic if the bounds are positive and `log_factor` or more apart."""
    if bounds is None:
        return
    low, high = bounds
    if low <= 0 or high < log_factor * low:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.06, high * 1.06)
    subs = range(1, 10) if axes.get_position().height > 0.2 else (1, 1.5, 2, 3, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs if high < 10 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_curve(axes: Axes, training: Rows, key: str, smoothed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Draws a metric of the steps and its moving average, and returns both; they are the same if short."""
    steps, values = _series(training, key)
    known = np.isfinite(values).sum()
    if not known:
        _say_empty(axes, "no training step yet")
        return values, values
    # With few rows, the average hardly differs from them.
    average = smooth(values) if smoothed and known >= 100 else values
    if average is not values:
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(
        steps, average, color=BLUE, marker="o" if known <= 10 else "", markersize=4, clip_on=known > 10,
        label="training, smoothed" if average is not values else "training",
    )  # fmt: skip
    return values, average


def _draw_evaluations(axes: Axes, evaluations: Rows, key: str, label: str) -> np.ndarray:
    steps, values = _series(evaluations, key)
    if len(steps):
        # Not clipped, because the last one is on the edge.
        axes.plot(steps, values, "o-", color=ORANGE, markersize=5, linewidth=1.3, clip_on=False, label=label)
    return values


def _draw_both(axes: Axes, training: Rows, evaluations: Rows, key: str) -> tuple[float, float] | None:
    """Draws a metric of the steps and of the evaluations. Returns a y range."""
    values, average = _draw_curve(axes, training, key)
    shown = np.append(average, _draw_evaluations(axes, evaluations, f"val_{key}", "held-out"))
    if axes.get_legend_handles_labels()[0]:
        # Beside the title, where it covers no curve.
        axes.legend(loc="lower right", bbox_to_anchor=(1.005, 0.998), ncols=2, borderaxespad=0, fontsize=10)
    return typical_range(values, shown)


def _draw_bits(axes: Axes, evaluations: Rows) -> None:
    known = [row for row in evaluations if row.get("val_bits_per_byte") is not None]
    if not known:
        return _say_empty(axes, "no evaluation yet")
    values = _draw_evaluations(axes, evaluations, "val_bits_per_byte", "")
    levels = {"model": (known[-1]["val_bits_per_byte"], ORANGE)}
    for name, dashes in (("gzip", (6, 3)), ("xz", (1.5, 2))):
        level = next((row[f"{name}_bits_per_byte"] for row in known if f"{name}_bits_per_byte" in row), None)
        if level is not None:
            levels[f"{name} -9"], values = (level, MUTED), np.append(values, level)
            axes.axhline(level, color=MUTED, linestyle=(0, dashes), linewidth=1.3)
    _set_range(axes, typical_range(np.empty(0), values), log_factor=2.0)
    _label_levels(axes, levels)


def _draw_accuracy(axes: Axes, evaluations: Rows) -> None:
    if not any(VAL_ACCURACY in row for row in evaluations):
        return _say_empty(axes, "no evaluation yet")
    _draw_evaluations(axes, evaluations, VAL_ACCURACY, "")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _label_levels(axes: Axes, levels: dict[str, tuple[float, str]]) -> None:
    """Names horizontal lines in the margin to the right of a plot, at their heights where there is room."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ordered = sorted(levels.items(), key=lambda item: -item[1][0])
    heights = [to_axes.transform((0, level))[1] for _, (level, _) in ordered]
    spread = [max(height, 0.12 * (len(heights) - 1 - place)) for place, height in enumerate(heights)]
    for place in range(1, len(spread)):
        spread[place] = min(spread[place], spread[place - 1] - 0.12)
    for (name, (level, color)), height in zip(ordered, spread, strict=True):
        text = f"{name}  {level:.2f}"
        axes.text(1.02, height, text, color=color, transform=axes.transAxes, va="center", fontsize=9.5)


def _draw_learning_rate(axes: Axes, training: Rows) -> None:
    values, _ = _draw_curve(axes, training, "learning_rate", smoothed=False)
    if np.isfinite(values).any():
        axes.set_ylim(0, 1.1 * np.nanmax(values) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_rate(value)))


def _draw_gradient(axes: Axes, training: Rows, max_norm: float) -> None:
    _set_range(axes, typical_range(*_draw_curve(axes, training, "grad_norm")), log_factor=6.0)
    low, high = axes.get_ylim()
    if low < max_norm < high:
        axes.axhline(max_norm, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.1)
        _note(axes, "dashed: clipped above")
    # `skipped_steps` counts up, so steps were skipped before a row in which it has grown.
    counts = [row.get("skipped_steps") or 0 for row in training]
    lost = [row.get("loss", 0) is None or row.get("grad_norm", 0) is None for row in training]
    is_skipped = (np.diff(counts, prepend=0) > 0) | np.array(lost, bool)
    skipped = [row["step"] for row, bad in zip(training, is_skipped, strict=True) if bad]
    if skipped:
        axes.plot(skipped, [0.94] * len(skipped), "x", color=RED, transform=axes.get_xaxis_transform())
        _note(axes, f"× not finite, skipped: {max(*counts, len(skipped))}", RED)


def _draw_speed(axes: Axes, training: Rows) -> None:
    values, _ = _draw_curve(axes, training, "tokens_per_second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    if np.isfinite(values).any():
        axes.set_ylim(0, 1.15 * max(np.nanpercentile(values, 99), 1e-9))
    used = [row["mfu"] for row in training if row.get("mfu") is not None]
    if used:
        _note(axes, f"median MFU {np.median(used):.1%}")


def expert_load(rows: Rows) -> tuple[np.ndarray, np.ndarray, int]:
    """Expert load as a heat map: `(steps [C], load [L, rows of a layer, C], group_size)`.

    The load is in units of the uniform share 1/E. With more experts than pixels, a row of a layer shows the
    one of `group_size` neighboring experts that is furthest from uniform, so that an average cannot hide an
    expert that has died or taken over. C is 0 if no row of the metrics has a load.
    """
    loads = [(row["step"], np.array(row["expert_load"], float)) for row in rows if row.get("expert_load")]
    loads = [(step, load_LE) for step, load_LE in loads if np.isfinite(load_LE).all()]
    if not loads:
        return np.empty(0), np.empty((0, 0, 0)), 1
    load_LEC = np.stack([load_LE for _, load_LE in loads], axis=2)
    L, E, _ = load_LEC.shape
    group_size = math.ceil(E / max(MAX_LOAD_ROWS // L, 1))
    furthest = []
    for first in range(0, E, group_size):
        group = load_LEC[:, first : first + group_size] * E
        furthest.append(np.take_along_axis(group, np.abs(group - 1).argmax(axis=1, keepdims=True), axis=1))
    return np.array([step for step, _ in loads]), np.concatenate(furthest, axis=1), group_size


def _draw_load(axes: Axes, training: Rows) -> None:
    steps, load, group_size = expert_load(training)
    if not len(steps):
        return _say_empty(axes, "no expert load recorded")
    L, rows, C = load.shape
    top = max(2.0, math.ceil(np.percentile(load, 99.5) * 2) / 2)
    # A load holds up to the next one.
    edges = [*steps, max(axes.get_xlim()[1], steps[-1] + 0.5)]
    heat_map = axes.pcolormesh(
        edges, np.linspace(0, L, L * rows + 1), load.reshape(L * rows, C),
        cmap="RdBu_r", norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top),
    )  # fmt: skip
    axes.grid(False)
    axes.invert_yaxis()
    axes.hlines(np.arange(1, L), edges[0], edges[-1], color=TEXT, linewidth=1.0 if L <= 16 else 0.4)
    labelled = range(0, L, math.ceil(L / 12))
    axes.set_yticks([layer + 0.5 for layer in labelled], [str(layer) for layer in labelled])
    axes.set_ylabel("layer")
    note = "one row per expert" if group_size == 1 else f"each row: the least even of {group_size} experts"
    _note(axes, note)
    place = axes.inset_axes((1.015, 0, 0.018, 1))
    bar = axes.figure.colorbar(heat_map, cax=place, extend="max", format="{x:g}", label="× uniform share")
    bar.set_ticks([0, 0.5, 1, *np.unique(np.round(np.linspace(1, top, 4)[1:] * 2) / 2)])
    outline: Any = bar.outline  # without the methods of an artist in the types of matplotlib 3.10
    outline.set_visible(False)


def _subtitle(config: TrainConfig, training: Rows, evaluations: Rows) -> str:
    total, active = parameter_counts(config.model)
    facts = [f"{format_count(total)} parameters ({format_count(active)} active)"]
    tokens = [row["tokens_seen"] for row in training if row.get("tokens_seen")]
    if tokens:
        facts.append(f"{format_count(tokens[-1])} tokens seen")
    known = [row for row in evaluations if row.get("val_bits_per_byte") is not None]
    if known:
        when = "final" if known[-1].get("final") else f"at step {known[-1]['step']:,}"
        facts.append(f"{known[-1]['val_bits_per_byte']:.3f} bits per byte held-out ({when})")
    return "  ·  ".join(facts)


def draw_report(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Draws `run_dir/report.png` (1600 x 1000) from its metrics.jsonl and config.json, and returns its path.

    Loss, bits per byte of held-out text (of pairs: the fraction of chosen answers that are preferred),
    learning rate, gradient norm, speed, and the fraction of assignments that each expert of each layer
    receives; of answers that are sampled, the reward, their length and the entropy instead of the first
    three. Any of them may be missing from the rows.
    Replaces an older picture atomically. Raises ValueError for a bad config or metrics file and
    FileNotFoundError if there are no metrics.
    """
    run = user_path(run_dir, "run")
    config = TrainConfig.load(run / "config.json")
    rows = read_metrics(run / "metrics.jsonl")
    training = [row for row in rows if "loss" in row]
    # By step, because the final evaluation may follow an ordinary one of the same step, and replaces it.
    is_evaluation = {"val_loss", "val_reward"}.intersection
    evaluations = list({row["step"]: row for row in rows if is_evaluation(row)}.values())
    seen = [row["step"] for row in rows] or [0, 1]
    limits = (min(seen), max(seen)) if max(seen) > min(seen) else (seen[0] - 0.5, seen[0] + 0.5)
    temporary, path = run / "report.png.tmp", run / "report.png"
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The name of a folder may be in a script that the font does not have.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        # Not by pyplot, which would keep global state and could choose a backend with windows.
        figure = Figure()
        FigureCanvasAgg(figure)
        left = figure.add_gridspec(2, 1, left=0.045, right=0.565, top=0.88, bottom=0.06, hspace=0.17)
        right = figure.add_gridspec(4, 1, left=0.675, right=0.93, top=0.88, bottom=0.06, hspace=0.34)
        titles = TITLES[config.objective]
        main = figure.add_subplot(left[0], title=titles[0])
        load = figure.add_subplot(left[1], title="Expert load", xlabel="step")
        quality = figure.add_subplot(right[0], title=titles[1])
        rate = figure.add_subplot(right[1], title=titles[2])
        norm = figure.add_subplot(right[2], title="Gradient norm")
        speed = figure.add_subplot(right[3], title="Tokens per second", xlabel="step")
        for axes in figure.axes:
            axes.set_xlim(*limits)
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.tick_params(labelbottom=axes in (load, speed))
        if config.objective == "grpo":
            _set_range(main, _draw_both(main, training, evaluations, "reward"), math.inf)
            length = typical_range(*_draw_curve(quality, training, "completions/mean_length"))
            _set_range(quality, length, log_factor=4.0)
            _set_range(rate, typical_range(*_draw_curve(rate, training, "entropy")), math.inf)
        else:
            _set_range(main, _draw_both(main, training, evaluations, "loss"), log_factor=2.0)
            (_draw_accuracy if config.objective == "dpo" else _draw_bits)(quality, evaluations)
            _draw_learning_rate(rate, training)
        _draw_load(load, training)
        _draw_gradient(norm, training, config.optim.max_grad_norm)
        _draw_speed(speed, training)
        name = printable(user_text(run.resolve().name)).replace("\n", " ")
        # A dollar sign in the folder's name would otherwise begin a formula.
        figure.text(0.045, 0.955, name, fontsize=18, fontweight="bold", color=TEXT, parse_math=False)
        figure.text(0.045, 0.927, _subtitle(config, training, evaluations), fontsize=11.5, color=MUTED)
        figure.savefig(temporary, format="png")
    os.replace(temporary, path)
    return path
