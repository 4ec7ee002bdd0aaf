"""Slices and nodes that training fits on: python benchmarks/scaling.py [--only TEXT ...] [--table].

For each line of PLANS, LONG and FINETUNING: the estimate from shapes and, for a TPU slice, the real train
step compiled by libtpu (minutes to an hour each, and several GB of memory). Each result is written to
results/scaling.json at once; results that are there are not repeated, except with --again. Prints the tables
of docs/distributed.md and docs/fine-tuning.md.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import time

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "scaling.json"

# Preset, slice or GPUs, mesh, rows of 4,096 tokens per step: one for each device that splits the batch.
PLANS = (
    ("gpt_oss_20b", "v5e:8x8", "fsdp=8,expert=8", 64),
    ("gpt_oss_20b", "v5e:8x8", "fsdp=16,expert=4", 64),
    ("gpt_oss_20b", "v5p:2x2x4", "fsdp=2,expert=8", 16),
    ("gpt_oss_20b", "v5p:2x2x4", "fsdp=16", 16),
    ("gpt_oss_20b", "v6e:4x8", "fsdp=4,expert=8", 32),
    ("gpt_oss_20b", "v6e:8x8", "fsdp=4,expert=16", 64),
    ("gpt_oss_20b", "tpu7x:2x2x2", "fsdp=2,expert=8", 16),
    ("gpt_oss_20b", "8xH200", "expert=8", 8),
    ("gpt_oss_20b", "2x8xH200", "data=2,expert=8", 16),
    ("gpt_oss_120b", "v5e:16x16", "fsdp=16,expert=16", 256),
    ("gpt_oss_120b", "v5e:16x16", "fsdp=32,expert=8", 256),
    ("gpt_oss_120b", "v5e:16x16", "fsdp=16,expert=8,tensor=2", 128),
    ("gpt_oss_120b", "v5p:4x4x4", "fsdp=2,expert=32", 64),
    ("gpt_oss_120b", "v5p:4x4x4", "fsdp=8,expert=8", 64),
    ("gpt_oss_120b", "v6e:16x16", "fsdp=4,expert=64", 256),
    ("gpt_oss_120b", "v6e:16x16", "fsdp=16,expert=16", 256),
    ("gpt_oss_120b", "tpu7x:2x4x4", "fsdp=2,expert=32", 64),
    ("gpt_oss_120b", "tpu7x:4x4x4", "fsdp=2,expert=64", 128),
    ("gpt_oss_120b", "8xH200", "fsdp=2,expert=4", 8),
    ("gpt_oss_120b", "2x8xH200", "fsdp=2,expert=8", 16),
    ("gpt_oss_120b", "4x8xH200", "fsdp=2,expert=16", 32),
    ("gpt_oss_120b", "8x8xH200", "expert=64", 64),
    ("gpt_oss_120b", "8x8xH200", "fsdp=8,expert=8", 64),
)
# Long sequences: preset, slice, mesh, sequences per step, tokens in each.
LONG = (
    ("gpt_oss_20b", "v5p:4x4x4", "fsdp=2,context=2,expert=16", 32, 32768),
    ("gpt_oss_20b", "v5p:4x4x4", "fsdp=2,context=8,expert=4", 8, 131072),
)
# Preset, slice or GPUs, mesh, flags of train.py: one row at a time for each device that splits the batch.
LARGE = "--model.num-hidden-layers 36 --model.num-local-experts 128"
FINETUNING = (
    ("sft_qlora_20b", "v5p:1x1x1", "data=1", ""),
    ("sft_qlora_20b", "v6e:1x1", "data=1", ""),
    ("sft_qlora_20b", "v6e:2x2", "data=4", "--optim.grad-accum-steps 2"),
    ("sft_qlora_20b", "v5e:2x2", "expert=4", "--optim.grad-accum-steps 2"),
    ("sft_qlora_20b", "1xH100", "data=1", ""),
    ("sft_qlora_120b", "v5p:1x1x1", "data=1", "--optim.grad-accum-steps 8"),
    ("sft_qlora_120b", "v6e:2x2", "expert=4", ""),
    ("sft_qlora_120b", "v5e:2x2", "expert=4", ""),
    ("sft_qlora_120b", "v5e:2x4", "expert=8", "--optim.grad-accum-steps 1"),
    ("sft_qlora_120b", "1xH100", "data=1", "--optim.grad-accum-steps 8"),
    ("sft_qlora_120b", "1xH200", "data=1", "--optim.grad-accum-steps 8"),
    ("sft_lora_20b", "v5p:1x1x1", "data=1", "--optim.grad-accum-steps 16"),
    ("sft_lora_20b", "v6e:2x2", "expert=4", "--optim.grad-accum-steps 4"),
    ("sft_lora_20b", "v5e:2x2", "expert=4", "--optim.grad-accum-steps 4"),
    ("sft_lora_20b", "1xH100", "data=1", "--optim.grad-accum-steps 16"),
    ("sft_lora_20b", "4xH100", "expert=4", f"--optim.grad-accum-steps 4 {LARGE}"),
    ("sft_lora_20b", "2xH200", "expert=2", f"--optim.grad-accum-steps 8 {LARGE}"),
    ("sft_full_20b", "8xH100", "expert=8", "--data.batch-size 8"),
    ("sft_full_20b", "4xH200", "expert=4", "--data.batch-size 4"),
    ("sft_full_20b", "4x8xH100", "expert=32", f"--data.batch-size 32 {LARGE}"),
    ("sft_full_20b", "2x8xH200", "expert=16", LARGE),
)


def key(row: dict) -> tuple:
    plan = tuple(
        row[name] for name in ("preset", "devices", "mesh", "flags" if "flags" in row else "batch_size")
    )
    return (*plan, row["seq_len"]) if is_long(row) else plan


def is_long(row: dict) -> bool:
    return "context=" in row["mesh"]


def read() -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def keep(row: dict) -> None:
    """Writes a row to the file, replacing an older one of the same plan."""
    rows = [other for other in read() if key(other) != key(row)] + [row]
    order = {plan: i for i, plan in enumerate(PLANS + LONG + FINETUNING)}
    rows.sort(key=lambda other: order.get(key(other), len(order)))
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RESULTS)


def measure(
    preset: str,
    devices: str,
    mesh: str,
    change: int | str,
    seq_len: int | None = None,
    compiled: bool = True,
) -> dict:
    from gptoss_jax.config.preset import read_preset
    from gptoss_jax.hardware import parse_topology
    from gptoss_jax.planning.plan import make_plan

    is_finetuning = isinstance(change, str)
    flags = change.split() if is_finetuning else ["--data.batch-size", str(change)]
    flags += [] if seq_len is None else ["--data.seq-len", str(seq_len)]
    folder = HERE.parent / "configs" / ("finetune" if is_finetuning else "")
    config = read_preset(folder / f"{preset}.py", flags)
    row = {"preset": preset, "devices": devices, "mesh": mesh, "batch_size": config.data.batch_size}
    row |= {"flags": change} if is_finetuning else {}
    row |= {"seq_len": config.data.seq_len, "remat": config.model.remat}
    row |= {"date": time.strftime("%Y-%m-%d"), "versions": {"jax": importlib.metadata.version("jax")}}
    if ":" in devices and not compiled:
        chip, count = parse_topology(devices)
        plan = make_plan(config, chip=chip.name, devices=count, meshes=[mesh])
    elif ":" in devices:
        plan = make_plan(config, topology=devices, meshes=[mesh])
        row["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    else:
        *counts, chip = devices.split("x")
        count = 1
        for text in counts:
            count *= int(text)
        plan = make_plan(config, chip=chip.lower(), devices=count, meshes=[mesh])
    values = plan.to_dict()
    row |= {"count": plan.devices, "memory": plan.chip.memory, "estimate": values["estimates"][0]}
    return row | {"compiled": values["compiled"][0] if values["compiled"] else None}


def table(rows: list[dict]) -> str:
    """Returns the table, in GB of one device. Compiled: the peak, or the need of a step that is too large."""
    lines = [
        "| model | devices | mesh | rows × tokens | HBM | estimated | compiled | fits "
        "| compute + network | sent: estimated, compiled |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        guess, (fits, size, capacity) = row["estimate"], figures(row)
        lines.append(
            f"| {row['preset'].removeprefix('gpt_oss_')} | {row['count']} ({row['devices']}) "
            f"| `{row['mesh']}` | {row['batch_size']} × {row['seq_len']:,} | {capacity / 1e9:,.1f} "
            f"| {guess['memory']['total'] / 1e9:,.1f} | {size} | {'yes' if fits else 'no'} "
            f"| {guess['compute_seconds']:,.2f} + {guess['communication_seconds']:,.2f} s "
            f"| {', '.join(f'{sent / 1e9:,.1f}' for sent in bytes_sent(row))} |"
        )
    return "\n".join(lines)


def bytes_sent(row: dict) -> list[float]:
    """Returns the bytes that a device sends besides the experts' rows: estimated and, if known, compiled."""
    programs = [row["estimate"], *([row["compiled"]] if row["compiled"] and row["compiled"]["fits"] else [])]
    return [
        sum(one["sent"] for one in program["collectives"] if not one["kind"].endswith("all-to-all"))
        for program in programs
    ]


def figures(row: dict) -> tuple[bool, str, float]:
    """Returns whether a step fits, its compiled size in GB, and the bytes of memory."""
    compiled = row["compiled"]
    if compiled is None:
        return row["estimate"]["fits"], "from shapes", row["memory"]
    needed = compiled["peak"] if compiled["fits"] else compiled["needed"]
    size = f"{needed / 1e9:,.1f}" if needed else "too much"
    return compiled["fits"], size, compiled["available"] or row["memory"]


def finetuning_table(rows: list[dict]) -> str:
    """Returns the table of fine-tuning, in GB of one device, with the arguments of `gptoss plan`."""
    lines = [
        "| | `gptoss plan` … | HBM | frozen | trained | estimated | compiled | fits |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        memory, (fits, size, capacity) = row["estimate"]["memory"], figures(row)
        kinds = {"sft_qlora": "QLoRA", "sft_lora": "LoRA", "sft_full": "full"}
        name = f"{row['preset'].rpartition('_')[2]} {kinds[row['preset'].rpartition('_')[0]]}"
        name = name.replace("20b", "120b") if LARGE in row["flags"] else name
        slice_ = f"--topology {row['devices']}"
        gpus = f"--chip {row['devices'].split('x')[-1].lower()} --devices {row['count']}"
        flags = f"{slice_ if ':' in row['devices'] else gpus} --mesh {row['mesh']} {row['flags']}".strip()
        trained = sum(memory[name] for name in ("parameters", "optimizer", "gradients"))
        sizes = (capacity, memory["frozen"], trained, memory["total"])
        cells = " | ".join(f"{size / 1e9:,.1f}" for size in sizes)
        lines.append(f"| {name} | `{row['preset']} {flags}` | {cells} | {size} | {'yes' if fits else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="only plans whose line contains all of these")
    parser.add_argument("--again", action="store_true", help="repeat results that are in the file")
    parser.add_argument(
        "--estimates", action="store_true", help="only update the estimates of the results in the file"
    )
    parser.add_argument(
        "--table", action="store_true", help="only print the table of the results in the file"
    )
    options = parser.parse_args()
    done = set() if options.again else {key(row) for row in read()}
    for row in read() if options.estimates else ():
        keep(row | {"estimate": measure(*key(row), compiled=False)["estimate"]})
    for plan in () if options.table or options.estimates else PLANS + LONG + FINETUNING:
        line = " ".join(map(str, plan))
        if plan in done or not all(word in line for word in options.only):
            continue
        print(line, flush=True)
        keep(measure(*plan))
    print(table([row for row in read() if "flags" not in row]), end="\n\n")
    print(finetuning_table([row for row in read() if "flags" in row]))


if __name__ == "__main__":
    main()
