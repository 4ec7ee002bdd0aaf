"""Tables of figures.py: kernels on CPU, and what the TPU compiler says about programs that have not run."""

import scaling
from page_blocks import number, period, ratio, share, source, spread, table

CHIPS = ("v5e", "v5p", "v6e")


def grouped_matmul(record: dict) -> str:
    """Returns the table of the part "grouped" of kernels.py."""
    found = record["grouped"]
    rows = [
        [f"{row['form']}, {row['E']}", spread(row["seconds"], scale=1e3), share(row["of_peak"])]
        + [f"{row['error']:.0e}", number(row["largest_of_mean"], 1)]
        for row in found["rows"]
    ]
    columns = ["implementation, experts", "ms", "share of the matmul peak", "error against float64"]
    return f"{table([*columns, 'largest group / mean'], rows)}\n\n{source(record)}"


def attention(record: dict) -> str:
    """Returns the table of the part "attention" of kernels.py."""
    rows = [
        [f"{row['layer']}, {row['T']:,}, {row['form']}", spread(row["seconds"], 1, 1e3)]
        + [ratio(row["times_as_fast"]), share(row["of_peak"])]
        + [None if row["error"] is None else f"{row['error']:.0e}"]
        for row in record["attention"]["rows"]
    ]
    columns = ["layer, tokens, implementation", "ms", "plain / this", "share of the matmul peak", "error"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def loss(record: dict) -> str:
    """Returns the table of the part "loss" of kernels.py."""
    found = record["loss"]
    rows = [
        [row["form"], spread(row["bytes"], 2, 1e-9), number(row["bytes"]["median"] / found["logits"], 2)]
        for row in found["rows"]
    ]
    columns = ["loss and gradients", "GB", "of one array of all logits"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def compiled_kernels(rows: list[dict]) -> str:
    """Returns the table of the kernels and layers of tpu_compile.py, in GB of temporaries."""
    found = {(row["program"], row["chip"]): row for row in rows}
    names = dict.fromkeys(row["program"] for row in rows if not row["program"].startswith("gpt-oss"))
    lines = []
    for name in names:
        of_chips = [row for chip in CHIPS if (row := found.get((name, chip)))]
        work = of_chips[0]["useful_flops"] and of_chips[0]["flops"] / of_chips[0]["useful_flops"]
        sizes = (number(found.get((name, chip), {}).get("temporaries"), 2, 1e-9) for chip in CHIPS)
        seconds = max(row["compile_seconds"] for row in of_chips)
        lines.append([name, ratio(work), *sizes, number(seconds)])
    columns = ["program", "operations / useful ones", *(f"temporary GB, {chip}" for chip in CHIPS)]
    return f"{table([*columns, 'seconds to compile, at most'], lines)}\n\n{compiler(rows)}"


def compiled_generation(rows: list[dict]) -> str:
    """Returns the table of generation of tpu_compile.py, in GB of arguments and temporaries."""
    found = {(row["program"], row["chip"]): row for row in rows}

    def cell(row: dict | None) -> str | None:
        if row is None:
            return None
        if "refusal" in row:
            return "does not fit"
        return f"{row['arguments'] / 1e9:.2f} + {row['temporaries'] / 1e9:.2f}"

    names = dict.fromkeys(row["program"] for row in rows if row["program"].startswith("gpt-oss"))
    lines = [
        [name.removeprefix("gpt-oss-20b, "), *(cell(found.get((name, chip))) for chip in CHIPS)]
        for name in names
    ]
    return f"{table(['', *CHIPS], lines)}\n\n{compiler(rows)}"


def compiler(rows: list[dict]) -> str:
    """Returns a line with the days and versions of compiled rows."""
    versions = {
        name: sorted({row["versions"][name] for row in rows if name in row["versions"]})
        for name in ("jax", "libtpu")
    }
    named = (f"{name} {' and '.join(some)}" for name, some in versions.items())
    return f"*{period(row['date'] for row in rows)}; {', '.join(named)}.*"


def training_memory(rows: list[dict]) -> str:
    """Returns the table of full training of scaling.py."""
    some = [row for row in rows if "flags" not in row]
    return f"{scaling.table(some)}\n\n{compiler(some)}"


def fine_tuning_memory(rows: list[dict]) -> str:
    """Returns the table of fine-tuning of scaling.py."""
    some = [row for row in rows if "flags" in row]
    return f"{scaling.finetuning_table(some)}\n\n{compiler(some)}"
