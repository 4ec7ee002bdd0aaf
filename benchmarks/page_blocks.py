"""Generated parts of the docs: where they are on a page, and how figures are written in them.

A page holds a part between `<!-- figures: NAME -->` and `<!-- end of figures -->`: in paragraphs of its own
if the first ends its line, otherwise inside a sentence.
"""

import re
from collections.abc import Callable, Iterable, Sequence

END = "<!-- end of figures -->"
# A part whose end is missing must not reach to the end of the next one.
BLOCK = re.compile(
    rf"(<!-- figures: ([\w-]+) -->)( |\n)((?:(?!<!-- figures: ).)*?){re.escape(END)}", re.DOTALL
)


def written(page: str) -> dict[str, str]:
    """Returns the texts of the generated parts of a page by name. Raises ValueError if one has no end."""
    begun = page.count("<!-- figures: ")
    if begun != page.count(END) or begun != len(BLOCK.findall(page)):
        raise ValueError(f"{begun} parts begin with <!-- figures: NAME -->, {page.count(END)} end with {END}")
    return {name: text.strip() for _, name, _, text in BLOCK.findall(page)}


def rewritten(page: str, make: Callable[[str], str]) -> str:
    """Returns the page with the text `make(name)` in each generated part. Raises ValueError as `written`."""
    written(page)

    def part(found: re.Match) -> str:
        space = "\n\n" if found[3] == "\n" else " "
        return f"{found[1]}{space}{make(found[2])}{space}{END}"

    return BLOCK.sub(part, page)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | None]], left: int = 1) -> str:
    """Returns a Markdown table: the first `left` columns left-aligned, the others right-aligned."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def number(value: float | None, digits: int = 0, scale: float = 1) -> str | None:
    return None if value is None else f"{scale * value:,.{digits}f}"


def ratio(value: float | None) -> str | None:
    return number(value, 2)


def share(value: float | None) -> str | None:
    """Returns a percentage, or None."""
    return None if value is None else f"{100 * value:.0f}%"


def spread(values: dict[str, float] | None, digits: int = 0, scale: float = 1) -> str | None:
    """Returns a spread of `common.spread` as median (min–max)."""
    if values is None:
        return None
    median, least, most = (f"{scale * values[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least}–{most})"


def period(days: Iterable[str]) -> str:
    """Returns the first and the last day, or the only one."""
    first, *_, last = sorted({*days}) * 2
    return first if first == last else f"{first} to {last}"


def source(record: dict, *more: str) -> str:
    """Returns a line that says when and on what a record was measured.

    Results may have dates of their own: those of earlier runs, which a run of some cases kept.
    """
    results = record.get("results")
    rows = [row for row in results if isinstance(row, dict)] if isinstance(results, list) else []
    days = [row.get("date", record["date"]) for row in rows] or [record["date"]]
    hardware, versions = record["hardware"], record.get("versions", {})
    cpu = re.sub(r"\(\w+\)| Processor|( CPU)? @.*", "", hardware["cpu"])
    machine = [f"{cpu}, {hardware['cores']} cores"]
    if "memory" in hardware:
        machine.append(f"{hardware['memory'] / 2**30:.0f} GiB")
    names = ("jax", "torch", "transformers", "peft")
    machine += [f"{name} {versions[name].partition('+')[0]}" for name in names if name in versions]
    rounds = record.get("rounds") or record.get("settings", {}).get("rounds")
    counted = [f"{rounds} round{'s' * (rounds > 1)}"] if rounds else []
    return f"*{'; '.join([period(days), ', '.join(machine), *counted, *more])}.*"
