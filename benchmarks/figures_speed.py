"""Tables of figures.py: training, fine-tuning and decoding, each against a peer or a limit."""

import itertools
import statistics

from finetune import LONGEST, LORA, PACKED, PADDED, QLORA
from page_blocks import number, ratio, share, source, spread, table

OURS = "gptoss_jax"


def experts(result: dict) -> str:
    return f"{result['experts']}, top-{result['top_k']}"


def fastest_peer(result: dict) -> float:
    """Returns our speed over that of the fastest implementation of the peer."""
    return min(value for name, value in result["ratios"].items() if name != OURS)


def training(record: dict) -> str:
    """Returns the table of train_vs_transformers.py, with a column for each peer that was measured."""
    results = record["results"]
    peers = dict.fromkeys(name for result in results for name in result["ratios"] if name != OURS)
    columns = ["experts", "tokens/s, ours", *(f"transformers, {name}" for name in peers)]
    columns += ["ours / the fastest", "share of the matmul peak"]
    rows = []
    for result in results:
        speeds = result["tokens_per_second"]
        peer_cells = (spread(speeds.get(name)) for name in peers)
        rows.append(
            [
                experts(result),
                spread(speeds[OURS]),
                *peer_cells,
                ratio(fastest_peer(result)),
                share(result["of_peak"]),
            ]
        )
    return f"{table(columns, rows)}\n\n{source(record)}"


def optimizer(record: dict) -> str:
    """Returns the table of optimizer.py."""
    speeds, shares = record["gigabytes_per_second"], record["shares"]
    rows = [[name, spread(speed, 1), share(shares[name])] for name, speed in speeds.items()]
    size = f"{record['parameter_bytes'] / 4e6:,.0f}M parameters"
    return f"{table(['', 'GB/s', 'share of the copy'], rows)}\n\n{source(record, size)}"


def bfloat16(record: dict) -> str:
    """Returns the table of bfloat16.py: milliseconds in float32, and the ratios to them."""
    rows = []
    for result in record["results"]:
        milliseconds = 1000 * statistics.median(result["seconds"]["float32"])
        ratios = (ratio(result["ratios"].get(side)) for side in ("bfloat16", "bfloat16 parameters"))
        rows.append([experts(result), result["part"], f"{milliseconds:,.1f}", *ratios])
    columns = ["experts", "", "float32, ms", "bfloat16 / float32", "parameters in bfloat16 / float32"]
    return f"{table(columns, rows, left=2)}\n\n{source(record)}"


def decoding(record: dict) -> str:
    """Returns the table of decode_vs_transformers.py."""
    rows = []
    for result in record["results"]:
        cells = [f"{experts(result)}, {result['batch']}"]
        for stage, show in (("prefill", lambda speed: number(speed["median"])), ("decode", spread)):
            speeds = result["tokens_per_second"][stage]
            cells += [*(show(speeds[name]) for name in (OURS, result["peers"][stage]))]
            cells.append(ratio(result["ratios"][stage]))
        same, total = result["same_tokens"], result["batch"] * result["new"]
        rows.append([*cells, f"{same:,} of {total:,}"])
    columns = ["experts, prompts", "prefill, ours", "transformers", "ratio", "decoding, ours", "transformers"]
    return f"{table([*columns, 'ratio', 'same greedy tokens'], rows)}\n\n{source(record)}"


def decoding_limit(record: dict) -> str:
    """Returns the table of decode_limit.py, and the bandwidths that its last columns divide by."""
    rows, bandwidths = [], []
    for result in record["results"]:
        speeds = {(row["form"], row["batch"]): row["tokens_per_second"]["median"] for row in result["rows"]}
        for row in result["rows"]:
            plain = speeds.get(("float32", row["batch"]))
            is_packed = row["form"] != "float32" and plain is not None
            rows.append(
                [
                    f"{result['model'].replace(' top', ', top')}, {row['form']}, {row['batch']}",
                    number(row["experts_of_a_layer"], 1),
                    number(row["step_bytes"] / 1e6, 1),
                    number(row["tokens_per_second"]["median"], 1),
                    number(row["limit"], 1),
                    share(row["of_limit"]),
                    share(row["of_reading"]),
                    ratio(speeds[row["form"], row["batch"]] / plain) if is_packed else None,
                ]
            )
        bandwidths.append([result[name]["bandwidth"] / 1e9 for name in ("fastest", "fastest_read")])
    columns = ["model, weights, prompts", "experts per layer", "MB per step", "tokens/s", "limit"]
    columns += ["share of the limit", "of the fastest read of 4 GiB", "MXFP4 / float32"]
    any_way, reading = (f"{min(some):.0f} to {max(some):.0f} GB/s" for some in zip(*bandwidths, strict=True))
    measured = source(record, f"bandwidth {any_way}, of reads alone {reading}")
    return f"{table(columns, rows)}\n\n{measured}"


def fine_tuning(record: dict) -> str:
    """Returns the table of the steps of finetune.py."""
    steps = record["steps"]
    names = {LORA: LORA, QLORA: f"{QLORA}, experts in MXFP4"}
    rows = [
        [names.get(name, name), spread(speed), ratio(steps["ratios"][name])]
        + [number(steps["compile_seconds"].get(name))]
        for name, speed in steps["tokens_per_second"].items()
    ]
    columns = ["step", "tokens/s", "LoRA / this", "seconds to compile"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def packed_rows(record: dict) -> str:
    """Returns the table of the rows of finetune.py."""
    found, length = record["rows"], record["settings"]["length"]
    names = {PADDED: f"padded to {length} tokens", LONGEST: "padded to the longest of the batch"}
    rows = [
        [names.get(name, name), share(found["filled"][name])]
        + [spread(found["trained_tokens_per_second"][name]), ratio(found["ratios"][name])]
        for name in (PACKED, PADDED, LONGEST)
    ]
    columns = ["rows", "filled", "trained tokens/s", "packed / this"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def more_experts(record: dict) -> str:
    """Returns the table of experts.py."""
    rows = [
        [f"{row['what']}, {row['E']}", spread(row["seconds"], scale=1e3)]
        + [number(row["tokens_per_second"]["median"]), share(row["of_peak"])]
        for row in record["rows"]
    ]
    columns = ["what, experts", "ms", "tokens/s", "share of the matmul peak"]
    return f"{table(columns, rows)}\n\n{source(record)}"


def remat(record: dict) -> str:
    """Returns the table of remat.py."""
    rows = [
        [f"`{row['remat']}`", spread(row["seconds"], scale=1e3), number(row["temporaries"] / 1e6)]
        for row in record["rows"]
    ]
    return f"{table(['model.remat', 'ms', 'temporary MB'], rows)}\n\n{source(record)}"


def long_rows(record: dict) -> str:
    """Returns the table of context.py."""
    found = {(row["kind"], row["T"]): row for row in record["rows"]}
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    rows = []
    for T in dict.fromkeys(T for _, T in found):
        cells = [f"{T:,}"]
        for kind in kinds:
            row = found.get((kind, T), {})
            cells += [spread(row.get("seconds"), scale=1e3), number(row.get("temporaries"), scale=1e-6)]
        rows.append(cells)
    columns = ["tokens", *itertools.chain.from_iterable((f"{kind}, ms", "temporary MB") for kind in kinds)]
    worst = "\n".join(
        f"- {bound['name']}: {bound['value']:.2f} ({bound['bound']})" for bound in record["bounds"]
    )
    squares = sum(map(len, record["arrays_of_T_x_T"].values()))
    longest = max(T for _, T in found)
    arrays = f"- Arrays with T × T elements in the compiled programs at T = {longest:,}: {squares}"
    return f"{table(columns, rows)}\n\n{worst}\n{arrays}\n\n{source(record)}"


def compile_time(record: dict) -> str:
    """Returns the table of compile_time.py."""
    few = record["rows"][0]["seconds"]["median"]
    rows = [
        [str(row["layers"]), spread(row["seconds"], 1), ratio(row["seconds"]["median"] / few)]
        for row in record["rows"]
    ]
    return f"{table(['layers', 'seconds', 'ratio'], rows)}\n\n{source(record)}"


def speed(training: dict, decoding: dict) -> str:
    """Returns the sentence of README.md about our speed over transformers' fastest implementation."""

    def between(ratios: list[float]) -> str:
        return f"{min(ratios):.1f} to {max(ratios):.1f}"

    steps = [fastest_peer(result) for result in training["results"]]
    tokens = [result["ratios"]["decode"] for result in decoding["results"]]
    return (
        f"is {between(steps)} times as fast as in transformers with its fastest expert\n"
        f"  implementation, and greedy decoding is {between(tokens)} times as fast"
    )
