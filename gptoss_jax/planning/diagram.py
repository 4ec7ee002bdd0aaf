"""Draws the architecture of a model config: blocks, attention heads and experts."""

from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

from gptoss_jax.config import SLIDING, ModelConfig
from gptoss_jax.hardware import parameter_counts
from gptoss_jax.terminal import format_count
from gptoss_jax.training.plots import BLUE, LINE, MUTED, ORANGE, STYLE, TEXT

LIGHT_BLUE, LIGHT_ORANGE, GRAY, PANEL = "#d6e4f5", "#fbe3c4", "#eef0f3", "#fafbfc"
WIDTH, HEIGHT = 160.0, 92.0  # drawing units; 12.5 per inch
MAX_BLOCKS = 8  # more are drawn as the first four, dots and the last two
MASK_TOKENS = 12  # rows and columns of the small masks


def draw_architecture(config: ModelConfig, title: str = "gpt-oss") -> Figure:
    """Returns a diagram of a model, with all sizes from its config.

    From left to right: the stack of blocks with the attention type of each, one block, and its details: the
    heads, masks and sinks of attention, and the router with its experts. Needs no weights:
    `draw_architecture(ModelConfig())` draws gpt-oss-20b. Notebooks display the result; `savefig` writes it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.8, 7.36))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
        axes.axis("off")
        total, active = (format_count(count) for count in parameter_counts(config))
        _text(axes, 4, 87, title, size=16, weight="bold", ha="left", parse_math=False)
        counts = f"{total} parameters, {active} of them used for a token"
        _text(axes, 4, 83, counts, size=10.5, color=MUTED, ha="left")
        _draw_stack(axes, config)
        _draw_block(axes, config)
        _draw_attention(axes, config)
        _draw_experts(axes, config)
    return figure


def _text(
    axes: Axes, x: float, y: float, text: str, size: float = 9, color: str = TEXT, **options: Any
) -> None:
    axes.text(x, y, text, fontsize=size, color=color, **{"ha": "center", "va": "center"} | options)


def _box(
    axes: Axes, place: tuple[float, float, float, float], text: str = "", color: str = GRAY, **options: Any
) -> None:
    """Draws a rounded box; `place` is left, bottom, width and height."""
    x, y, width, height = place
    edge = options.pop("edge", "none")
    style = "round,pad=0,rounding_size=1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=color, edgecolor=edge))
    if text:
        _text(axes, x + width / 2, y + height / 2 - 0.1, text, **options)


def _arrow(axes: Axes, *points: tuple[float, float], color: str = MUTED) -> None:
    """Draws a line through points, with an arrowhead at the last one."""
    *_, before, last = points
    axes.plot(*zip(*points[:-1], before, strict=True), color=color, linewidth=1.2, solid_capstyle="round")
    arrow = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2}
    axes.annotate("", last, before, arrowprops=arrow)


def _draw_stack(axes: Axes, config: ModelConfig) -> None:
    """Draws tokens, embedding, all blocks, final norm and head, from bottom to top."""
    D, V, L = config.hidden_size, config.vocab_size, config.num_hidden_layers
    left, width, middle = 4.0, 36.0, 22.0
    _text(axes, middle, 4, "tokens", color=MUTED)
    _arrow(axes, (middle, 5.5), (middle, 9))
    _box(axes, (left, 9, width, 5), f"embedding   {V:,} × {D:,}")
    kinds = config.resolved_layer_types
    shown = [*range(L)] if L <= MAX_BLOCKS else [0, 1, 2, 3, None, L - 2, L - 1]
    step = 46 / len(shown)
    axes.plot((middle, middle), (14, 62), color=MUTED, linewidth=1.2, zorder=0)
    _arrow(axes, (middle, 62), (middle, 64.8))
    for row, layer in enumerate(shown):
        y, height = 17.5 + row * step, min(step - 1.2, 6)
        if layer is None:
            # White, to interrupt the line.
            _box(axes, (middle - 2, y - 0.6, 4, height + 1.2), "⋮", "white", size=16)
            continue
        is_sliding = kinds[layer] == SLIDING
        name, color = ("sliding window", LIGHT_BLUE) if is_sliding else ("full attention", LIGHT_ORANGE)
        _box(axes, (left, y, width, height), f"block {layer}   {name}", color)
    _box(axes, (left, 65, width, 4.2), "RMSNorm")
    tied = "   (embedding)" if config.tie_word_embeddings else ""
    _arrow(axes, (middle, 69.2), (middle, 71.6))
    _box(axes, (left, 71.8, width, 4.6), f"head   {D:,} × {V:,}{tied}")
    _text(axes, middle, 78.6, "logits of the next token", color=MUTED)


def _draw_block(axes: Axes, config: ModelConfig) -> None:
    """Draws one block: the residual stream, and the two branches that read from and add to it."""
    _box(axes, (47, 7, 41, 69.4), color=PANEL, edge=LINE)
    _text(axes, 60, 73.2, "one block", size=10.5, weight="bold", ha="left")
    stream, left, width = 53.0, 60.0, 25.0
    _arrow(axes, (stream, 3.5), (stream, 80))
    _text(axes, stream - 2, 51, f"residual stream, {config.hidden_size:,} wide", color=MUTED, rotation=90)
    for bottom, name, detail, color in (
        (12, "attention", "reads earlier tokens", LIGHT_BLUE),
        (44, "mixture of experts", "works on each token", LIGHT_ORANGE),
    ):
        middle = left + width / 2
        _arrow(axes, (stream, bottom), (middle, bottom), (middle, bottom + 2.8))
        _box(axes, (left, bottom + 3, width, 4.2), "RMSNorm")
        _arrow(axes, (middle, bottom + 7.2), (middle, bottom + 9.8))
        _box(axes, (left, bottom + 10, width, 9), color=color)
        _text(axes, middle, bottom + 15.8, name, size=10, weight="bold")
        _text(axes, middle, bottom + 12.4, detail, size=8.5, color=MUTED)
        plus = bottom + 23
        _arrow(axes, (middle, bottom + 19), (middle, plus), (stream + 1.6, plus))
        axes.add_patch(Circle((stream, plus), 1.6, facecolor="white", edgecolor=MUTED, zorder=3))
        _text(axes, stream, plus, "+", size=11, zorder=4)


def _panel(axes: Axes, bottom: float, height: float, title: str, color: str, source: float) -> None:
    """Draws a panel on the right that magnifies the block's box at height `source`."""
    for y in (bottom, bottom + height):
        axes.plot((85, 97), (source + (2.5 if y > source else -2.5), y), color=color, linewidth=1, alpha=0.8)
    _box(axes, (97, bottom, 60, height), color=PANEL, edge=color)
    _text(axes, 100, bottom + height - 3.2, title, size=10.5, weight="bold", ha="left")


def _squares(
    axes: Axes,
    lefts: Iterable[float],
    y: float,
    size: tuple[float, float],
    color: str,
    edge: str = "white",
) -> None:
    for x in lefts:
        axes.add_patch(Rectangle((x, y), *size, facecolor=color, edgecolor=edge, linewidth=0.5))


def _draw_attention(axes: Axes, config: ModelConfig) -> None:
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    _panel(axes, 3, 42, "attention", BLUE, source=26.5)
    left, width = 100.0, 54.0
    scaling = config.rope_scaling
    yarn = "" if scaling is None else f", YaRN × {scaling.factor:g}"
    rope = f"heads of {H}   ·   RoPE, θ = {config.rope_theta:,.0f}{yarn}"
    _text(axes, 154, 41.8, rope, size=8.5, color=MUTED, ha="right")
    # Each key/value head is drawn below its query heads.
    slot = width / N
    gap = min(0.5, 0.12 * slot)
    _squares(axes, left + slot * np.arange(N) + gap / 2, 34.2, (slot - gap, 3), BLUE)
    group = slot * N / K
    _squares(axes, left + group * np.arange(K) + gap / 2, 30.4, (group - gap, 3), "#8fb4de")
    each = f", each shared by {N // K}" if N > K else ""
    plural = "s" if K > 1 else ""
    heads = f"{N} query heads above {K} head{plural} of keys and values{each}"
    _text(axes, left, 27.8, heads, size=8.5, color=MUTED, ha="left")
    kinds, window = config.resolved_layer_types, config.sliding_window
    counts = kinds.count(SLIDING), len(kinds) - kinds.count(SLIDING)
    sliding, full = (f"{n} layer{'' if n == 1 else 's'}" for n in counts)
    masks = (
        (104, f"{sliding}: latest {window:,} tokens", 4, BLUE),
        (133, f"{full}: all earlier tokens", None, ORANGE),
    )
    for x, name, band, color in masks:
        _draw_mask(axes, x, band, color, config)
        _text(axes, x + 6.6, 5.4, name, size=8.5)


def _draw_mask(axes: Axes, left: float, band: int | None, color: str, config: ModelConfig) -> None:
    """Draws a small mask, with queries from top to bottom, and the sink next to its keys."""
    size, top = 1.2, 22.6
    for query in range(MASK_TOKENS):
        y = top - (query + 1) * size
        for key in range(MASK_TOKENS):
            is_near = band is None or query - key < band or key < config.sink_tokens
            shade = color if key <= query and is_near else "#e7eaee"
            _squares(axes, [left + key * size], y, (size, size), shade)
        if config.learned_sinks:
            _squares(axes, [left - 2.2], y, (size, size), TEXT)
    if config.learned_sinks:
        _text(axes, left - 1.6, top + 1.5, "sink", size=8)
    _text(axes, left + 7.2, top + 1.5, "keys", size=8, color=MUTED)
    _text(axes, left + 15.4, top - 7.2, "queries", size=8, color=MUTED, rotation=270)


def _draw_experts(axes: Axes, config: ModelConfig) -> None:
    E, X, D, F = (
        config.num_local_experts,
        config.num_experts_per_tok,
        config.hidden_size,
        config.intermediate_size,
    )
    _panel(axes, 49, 36, "mixture of experts", ORANGE, source=58.5)
    _box(axes, (100, 52, 54, 4.4), f"router   {D:,} → {E} logits, softmax over the best {X}")
    columns = min(E, 8 if E <= 16 else 16 if E <= 64 else 32)
    rows = -(-E // columns)
    slot, tall = 54 / columns, 12 / rows
    gap = 0.12 * min(slot, tall)
    chosen = np.random.default_rng(E).permutation(E)[:X]
    for expert in range(E):
        row, column = divmod(expert, columns)
        x, y = 100 + column * slot + gap / 2, 72.6 - (row + 1) * tall + gap / 2
        is_chosen = expert in chosen
        place = (x, y), slot - gap, tall - gap
        axes.add_patch(Rectangle(*place, facecolor=ORANGE if is_chosen else LIGHT_ORANGE, edgecolor="none"))
        if is_chosen:
            _arrow(axes, (127, 56.4), (x + (slot - gap) / 2, y - 0.1), color=TEXT)
    _text(axes, 100, 75.4, f"{E} experts per layer, {X} for each token", size=8.5, color=MUTED, ha="left")
    sizes = f"SwiGLU   {D:,} → 2 × {F:,} → {D:,}"
    _text(axes, 154, 81.8, sizes, size=8.5, color=MUTED, ha="right")
