"""Tables of figures.py: serving, sampling and loading."""

import statistics

from page_blocks import number, ratio, source, spread, table
from serve_load import ENGINE, SLOTS
from serve_vs_llamacpp import OURS, PEER
from serving import PERCENTILES

FORMS = {"float32": "float32", "mxfp4": "MXFP4"}


def median(results: list[dict], name: str) -> float:
    return statistics.median(result[name] for result in results)


def llamacpp(record: dict) -> str:
    """Returns the table of serve_vs_llamacpp.py."""
    rows = []
    for result in record["results"]:
        sides = [result["figures"][name] for name in (OURS, PEER)]
        speeds = [number(median(side, "tokens_per_second")) for side in sides]
        waits = [number(median(side, "ttft_p50")) for side in sides]
        name = f"{result['experts']}, {FORMS[result['form']]}, {result['clients']}"
        same = f"{result['same_tokens']:,} of {result['tokens']:,}"
        rows.append([name, *speeds, ratio(result["ratio"]), *waits, same])
    columns = ["experts, weights, clients", f"tokens/s, {OURS}", PEER, "ratio", f"first token, ms, {OURS}"]
    version = f"xllamacpp {record['xllamacpp']}"
    return f"{table([*columns, PEER, 'same greedy tokens'], rows)}\n\n{source(record, version)}"


def load(record: dict) -> str:
    """Returns the table of serve_load.py."""
    rows = []
    for name, results in record["loads"].items():
        times = (
            " / ".join(number(median(results, f"{kind}_p{percentile}")) or "" for percentile in PERCENTILES)
            for kind in ("ttft", "itl", "tpot")
        )
        rows.append([name, number(median(results, "tokens_per_second")), *times])
    for name in ENGINE:
        speed = median(record["engine_tokens_per_second"], name)
        rows.append([f"the engine by itself, batch of {SLOTS}, {name}", number(speed), None, None, None])
    percentiles = " / ".join(f"p{percentile}" for percentile in PERCENTILES)
    columns = ["load", "tokens/s", f"first token, {percentiles}, ms", "between events", "per token"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def prefixes(record: dict) -> str:
    """Returns the table of serve_prefixes.py."""
    rows = []
    for mode, results in record["results"].items():
        times = [number(median(results, name)) for name in ("first_ms", "second_ms", "cached_tokens")]
        rows.append([f"`--prefix-reuse {mode}`", *times])
    columns = ["server", "first token of turn 1, ms", "of turn 2", "reused tokens"]
    (bound,) = record["bounds"]
    found = f"median ratio of turn 2 {ratio(bound['value'])}"
    same = f"{record['same']} of {record['rounds']} conversations have the same tokens with both"
    return f"{table(columns, rows)}\n\n{source(record, found, same)}"


def sampling(record: dict) -> str:
    """Returns the table of sampling.py."""
    rows = []
    for row in record["results"]:
        ours, peer = (1e3 * statistics.median(seconds) for seconds in row["seconds"].values())
        name = f"{row['V']:,}, {row['B']}, {row['settings']}"
        rows.append([name, number(ours, 3), number(peer, 3), ratio(row["ratio"])])
    columns = ["vocabulary, sequences, settings", "ms, ours", "sorting", "ratio"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def loading(record: dict) -> str:
    """Returns the table of load.py."""

    def gigabytes(row: dict, name: str) -> str | None:
        return number(row[name] / 1e9, 2) if name in row else None

    names = {"mxfp4": "packed", "bfloat16": "dequantized to bfloat16"}
    rows = []
    for row in record["rows"]:
        seconds = spread({"median": row["seconds"], "min": row["spread"][0], "max": row["spread"][1]}, 2)
        sizes = (gigabytes(row, name) for name in ("loaded", "peak"))
        rows.append([names.get(row["name"], row["name"]), seconds, ratio(row["speed"]), *sizes])
    columns = ["", "seconds", "speed of a plain read", "loaded GB", "peak GB of the weights"]
    size = f"{record['bytes'] / 1e9:.2f} GB of files"
    return f"{table(columns, rows)}\n\n{source(record, size)}"
