"""Draws the diagrams of the documentation: python docs/diagrams.py writes docs/assets/*.svg.

Positions of rows and slots follow the rules of the code: the order of rows in `parallel/all_to_all.py`, and
`slot_index` of `kernels/attention/cached.py`. The engine's timeline is a log of `Engine.step`.
"""

import pathlib
from html import escape

ASSETS = pathlib.Path(__file__).parent / "assets"

STYLE = """
.diagram {{ --fg: #1f2328; --muted: #59636e; --line: #8c959f; --band: #8c959f1a;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; }}
@media (prefers-color-scheme: dark) {{ .diagram {{ --fg: #e6edf3; --muted: #9da7b3; --line: #6e7681;
  --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; }} }}
[data-md-color-scheme=default] .diagram {{ --fg: #1f2328; --muted: #59636e; --line: #8c959f;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; }}
[data-md-color-scheme=slate] .diagram {{ --fg: #e6edf3; --muted: #9da7b3; --line: #6e7681;
  --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; }}
.diagram text {{ fill: var(--fg); font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  text-anchor: middle; dominant-baseline: central; }}
.diagram .left {{ text-anchor: start; }} .diagram .right {{ text-anchor: end; }}
.diagram .head {{ font-weight: 600; }} .diagram .note {{ fill: var(--muted); font-size: 12px; }}
.diagram .box {{ stroke-width: 1.3; fill-opacity: .16; }}
.diagram .empty {{ fill: none; stroke: var(--line); stroke-dasharray: 3 3; }}
.diagram .frame {{ fill: var(--band); stroke: var(--line); }}
.diagram .band {{ fill: var(--band); }}
.diagram .arrow {{ fill: none; stroke-width: 1.4; opacity: .85; }}
.diagram .axis {{ stroke: var(--line); }}
"""


class Drawing:
    """Collects SVG elements."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, color: int | None, text: str = "") -> None:
        """Draws a cell, in one of the four colors or dashed; its text is in the middle."""
        look = 'class="empty"'
        if color is not None:
            look = f'class="box" style="fill:var(--c{color});stroke:var(--c{color})"'
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" {look}/>')
        self.text(x + w / 2, y + h / 2, text)

    def frame(self, x: float, y: float, w: float, h: float, kind: str = "frame") -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" class="{kind}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        if text:
            self.parts.append(f'<text x="{x}" y="{y}" class="{kind}">{escape(text)}</text>')

    def arrow(self, x0: float, y0: float, x1: float, y1: float, color: int) -> None:
        bend = (x1 - x0) / 2
        curve = f"M{x0},{y0} C{x0 + bend},{y0} {x1 - bend},{y1} {x1},{y1}"
        self.parts.append(f'<path d="{curve}" class="arrow" style="stroke:var(--c{color})"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" class="axis"/>')

    def save(self, name: str) -> None:
        w, h = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" class="diagram" role="img">'
        style = STYLE.format().strip()
        body = "\n".join(self.parts)
        text = f"{head}\n<title>{escape(self.title)}</title>\n<style>\n{style}\n</style>\n{body}\n</svg>\n"
        (ASSETS / name).write_text(text, encoding="utf-8")


def draw_experts() -> None:
    """Two devices of the expert axis, four experts, two per token: dispatch, grouped matmul, combine."""
    tokens = [{"a": (0, 2), "b": (1, 2), "c": (0, 3)}, {"d": (2, 3), "e": (0, 2), "f": (1, 3)}]
    # Each device sorts its rows by expert; the sort is stable.
    rows = [sorted(((e, t) for t, es in own.items() for e in es), key=lambda r: r[0]) for own in tokens]
    # A device receives its experts' rows ordered by expert, and within an expert by sender.
    arrived = [
        [(e, t) for e in (2 * d, 2 * d + 1) for sender in rows for (f, t) in sender if f == e] for d in (0, 1)
    ]
    buffer = 8  # 125% of the six rows that an even router sends, rounded up
    cell, step, lane, top = 24, 28, 300, 96
    columns = [20, 170, 330, 470, 630, 790]
    drawing = Drawing(900, 720, "How tokens reach their experts on a mesh and come back")
    heads = ["tokens", "rows sorted", "buffer of the", "output of its", "rows back in", "weighted sum"]
    seconds = [
        "and their experts",
        "by expert",
        "expert's device",
        "expert",
        "sorted order",
        "for each token",
    ]
    widths = [110, 70, 70, 90, 70, 90]
    for x, w, head, second in zip(columns, widths, heads, seconds, strict=True):
        drawing.text(x + w / 2, 24, head, "head")
        drawing.text(x + w / 2, 42, second, "note")
    y_of = [top + lane * d for d in (0, 1)]
    for d in (0, 1):
        drawing.frame(8, y_of[d] - 30, 884, 270)
        drawing.text(20, y_of[d] - 14, f"device {d}: experts {2 * d} and {2 * d + 1}", "left head")
    row_y = [[y_of[d] + 8 + step * i for i in range(buffer)] for d in (0, 1)]
    for d in (0, 1):
        for i, (token, experts) in enumerate(tokens[d].items()):
            y = y_of[d] + 12 + 70 * i
            drawing.box(columns[0], y, 60, 52, None, f"token {token}")
            drawing.box(columns[5], y + 6, 90, 40, None, f"y({token})")
            for k, e in enumerate(experts):
                r = row_y[d][rows[d].index((e, token))] + cell / 2
                drawing.box(columns[0] + 66, y + 28 * k, 30, cell, e, str(e))
                drawing.arrow(columns[0] + 96, y + 28 * k + cell / 2, columns[1], r, e)
                drawing.arrow(columns[4] + 70, r, columns[5], y + 26, e)
        for i, (e, t) in enumerate(rows[d]):
            drawing.box(columns[1], row_y[d][i], 70, cell, e, f"{t} → {e}")
            drawing.box(columns[4], row_y[d][i], 70, cell, e, f"{e}({t})")
            owner = e // 2
            at = arrived[owner].index((e, t))
            y = row_y[owner][at] + cell / 2
            drawing.arrow(columns[1] + 70, row_y[d][i] + cell / 2, columns[2], y, e)
            drawing.arrow(columns[3] + 90, y, columns[4], row_y[d][i] + cell / 2, e)
        for i in range(buffer):
            row = arrived[d][i] if i < len(arrived[d]) else None
            drawing.box(columns[2], row_y[d][i], 70, cell, row and row[0], row[1] if row else "")
        for e in (2 * d, 2 * d + 1):
            places = [i for i, row in enumerate(arrived[d]) if row[0] == e]
            first, count = row_y[d][places[0]], len(places)
            drawing.box(columns[3], first, 90, step * count - step + cell, e, f"expert {e}")
            for i in places:
                y = row_y[d][i] + cell / 2
                drawing.arrow(columns[2] + 70, y, columns[3], y, e)
    for x, text in [(285, "dispatch"), (595, "combine")]:
        drawing.text(x, 672, text, "head")
        drawing.text(x, 690, "all_to_all", "note")
    drawing.text(435, 672, "grouped matmul", "head")
    drawing.save("experts.svg")


def slot_index(position: int, slots: int, sink_tokens: int) -> int:
    """Mirrors `kernels/attention/cached.py`."""
    if position < slots:
        return position
    return sink_tokens + (position - sink_tokens) % (slots - sink_tokens)


def draw_ring() -> None:
    """The caches after ten tokens, of a full layer and of sliding layers with a window of four."""
    length, window, cell = 10, 4, 42
    drawing = Drawing(890, 380, "The KV cache of full and sliding layers after ten tokens")
    x0 = 210

    def row(y: float, name: str, note: str, slots: int, sink_tokens: int | None) -> None:
        drawing.text(x0 - 16, y + 8, name, "right head")
        drawing.text(x0 - 16, y + 28, note, "right note")
        held = {}
        for position in range(length):
            slot = position if sink_tokens is None else slot_index(position, slots, sink_tokens)
            held[slot] = position
        for slot in range(slots):
            position = held.get(slot)
            color = None if position is None else 2 if position < (sink_tokens or 0) else 0
            if position is not None and position == length - 1:
                color = 1
            drawing.box(x0 + cell * slot, y, cell - 6, 36, color, "" if position is None else str(position))
            drawing.text(x0 + cell * slot + (cell - 6) / 2, y + 48, str(slot), "note")
        drawing.text(x0 - 16, y + 48, "slot", "right note")

    drawing.text(x0 - 16, 34, "tokens read", "right head")
    for position in range(length):
        x = x0 + cell * position
        drawing.box(x, 18, cell - 6, 32, 1 if position == length - 1 else 0, str(position))
    begin, end = x0 + cell * (length - window), x0 + cell * length - 6
    drawing.parts.append(
        f'<path d="M{begin},60 v6 H{end} v-6" fill="none" style="stroke:var(--c1)" stroke-width="1.6"/>'
    )
    drawing.text((begin + end) / 2, 80, "visible to token 9 in a sliding layer, window 4", "note")
    row(106, "full layer", "a slot for every token", 16, None)
    row(206, "sliding layer", "a ring: slot = p mod 4", window, 0)
    drawing.text(x0 + cell * window + 12, 216, "token 10 goes to slot 2, in place of token 6,", "left note")
    drawing.text(x0 + cell * window + 12, 234, "which no later query sees", "left note")
    row(306, "with sink_tokens 1", "first slot stays", window + 1, 1)
    drawing.text(
        x0 + cell * (window + 1) + 12, 316, "slot = 1 + (p − 1) mod 4; token 0 stays visible", "left note"
    )
    drawing.text(
        x0 + cell * (window + 1) + 12, 334, "(0 in gpt-oss: its learned sinks need no slot)", "left note"
    )
    drawing.save("ring-cache.svg")


def draw_engine() -> None:
    """A log of `Engine.step` with three slots; D begins with A's prompt of 1,100 tokens."""
    steps, column, x0 = 8, 86, 150
    drawing = Drawing(x0 + column * steps + 20, 470, "Continuous batching in an engine with three slots")
    colors = {"A": 0, "B": 1, "C": 2, "D": 3}
    lanes = {"wait": 70, "read": 140, 0: 232, 1: 282, 2: 332}
    drawing.text(x0 - 14, 24, "Engine.step", "right head")
    for s in range(steps):
        x = x0 + column * s
        drawing.text(x + column / 2, 24, str(s + 1), "note")
        if s > 0:
            drawing.frame(x + 5, lanes[0] - 10, column - 10, 156, "band")
    for name, text, note in [
        ("wait", "waiting", "for a slot"),
        ("read", "reading", "one chunk per step"),
        (0, "slot 0", ""),
        (1, "slot 1", ""),
        (2, "slot 2", ""),
    ]:
        y = lanes[name] + 18
        drawing.text(x0 - 14, y - (8 if note else 0), text, "right head")
        drawing.text(x0 - 14, y + 10, note, "right note")

    def bar(lane, first: int, last: int, request: str, text: str) -> None:
        x = x0 + column * (first - 1) + 6
        drawing.box(x, lanes[lane], column * (last - first + 1) - 12, 36, colors[request], text)

    bar("wait", 3, 5, "D", "D: as long as no slot is free")
    reads = [
        (1, "A", "0–511"),
        (2, "C", "0–98"),
        (3, "A", "512–1023"),
        (4, "A", "1024–1098"),
        (5, "B", "0–298"),
    ]
    for step, request, text in [*reads, (6, "D", "1099–1398")]:
        bar("read", step, step, request, f"{request}")
        drawing.text(x0 + column * (step - 0.5), lanes["read"] + 48, text, "note")
    bar(0, 2, 4, "C", "C answers")
    drawing.box(x0 + column * 4 + 6, lanes[0], column - 12, 36, None, "free")
    bar(0, 6, 8, "D", "D answers")
    bar(1, 4, 8, "A", "A answers")
    bar(2, 5, 8, "B", "B answers")
    y = 398
    drawing.text(
        x0,
        y,
        "Gray: one decode call for all slots, sent before the tokens of the last one are read.",
        "left note",
    )
    drawing.text(
        x0,
        y + 22,
        "C ends in step 4 by itself; the host reads that in step 5, and D gets its slot in step 6.",
        "left note",
    )
    drawing.text(
        x0,
        y + 44,
        "D begins with A's prompt: tokens 0–1098 come from the prefix cache, only the rest is read.",
        "left note",
    )
    drawing.save("engine.svg")


if __name__ == "__main__":
    draw_experts()
    draw_ring()
    draw_engine()
