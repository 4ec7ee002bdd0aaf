"""Memory that chatting, serving and training take: python benchmarks/memory_table.py [--write].

Prints the tables of docs/comparison.md and, shorter, of README.md: for each task and kind of device the
fewest devices, a power of two, that it fits on, by the estimates of `gptoss plan`; `--write` puts them there.
Takes a minute and needs no device: nothing is compiled or run.
"""

import argparse
import dataclasses
import functools
import pathlib

from gptoss_jax.config.preset import read_preset
from gptoss_jax.hardware import CHIPS
from gptoss_jax.planning.estimate import Estimate
from gptoss_jax.planning.inference import Experts, InferenceEstimate, Workload, plan_inference
from gptoss_jax.planning.plan import make_plan

ROOT = pathlib.Path(__file__).parents[1]
# Files with tables, each between its first line and END.
PAGES = (ROOT / "docs" / "comparison.md", ROOT / "README.md")
START = "<!-- memory table: python benchmarks/memory_table.py --write -->"
SHORT = "<!-- short memory table: python benchmarks/memory_table.py --write -->"
END = "<!-- end of the memory table -->"
NAMES = {"v5e": "TPU v5e", "v6e": "TPU v6e", "v5p": "TPU v5p", "h100": "H100", "h200": "H200"}
COUNTS = tuple(2**i for i in range(9))
LARGE = ("--model.num-hidden-layers", "36", "--model.num-local-experts", "128")

# Rows of the short table: names of tasks, and what they are called there.
BRIEF = {
    f"{size}: {name}": brief.format(size)
    for size in ("20b", "120b")
    for name, brief in (
        ("chat, 8,192 tokens", "chat with {}, 8,192 tokens"),
        ("serve 8 requests of 32,768 tokens", "serve {}, 8 requests of 32,768 tokens"),
        ("QLoRA", "QLoRA of {}"),
        ("full fine-tuning or pretraining", "full training of {}"),
    )
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A row: how it is planned. Training has one row of 4,096 tokens at a time for each device."""

    name: str
    preset: str
    flags: tuple[str, ...] = ()
    # Inference, if it is not a training step.
    workload: Workload | None = None
    experts: Experts = "mxfp4"


def tasks() -> list[Task]:
    found: list[Task] = []
    inference: tuple[tuple[str, int, int, Experts], ...] = (
        ("chat, 8,192 tokens", 1, 8192, "mxfp4"),
        ("chat, 131,072 tokens", 1, 131072, "mxfp4"),
        ("serve 8 requests of 32,768 tokens", 8, 32768, "mxfp4"),
        ("chat, 8,192 tokens, bfloat16 experts", 1, 8192, "bfloat16"),
    )
    for size, flags in (("20b", ()), ("120b", LARGE)):
        base = f"gpt_oss_{size}"
        for name, slots, context, experts in inference:
            found.append(Task(f"{size}: {name}", base, (), Workload(slots, context), experts))
        accumulate = ("--optim.grad-accum-steps", "2")
        found += [
            Task(f"{size}: QLoRA", f"finetune/sft_qlora_{size}", accumulate),
            Task(f"{size}: LoRA, bfloat16 experts", "finetune/sft_lora_20b", (*flags, *accumulate)),
            Task(f"{size}: full fine-tuning or pretraining", base, ("--optim.grad-accum-steps", "1")),
        ]
    return found


@functools.cache
def estimates(task: Task, count: int, is_tpu: bool) -> tuple[Estimate | InferenceEstimate, ...]:
    """Returns the estimates for all meshes of `count` devices, least memory first."""
    chip = "v5p" if is_tpu else "h100"
    path = ROOT / "configs" / f"{task.preset}.py"
    if task.workload is not None:
        model = read_preset(path).model
        plan = plan_inference(model, chip=chip, devices=count, workload=task.workload, experts=task.experts)
        return tuple(plan.estimates)
    config = read_preset(path, [*task.flags, *batch_flags(task, count)])
    found = make_plan(config, chip=chip, devices=count, has_suggestion=False).estimates
    return tuple(sorted(found, key=lambda one: one.memory.total))


def batch_flags(task: Task, count: int) -> list[str]:
    return ["--data.batch-size", str(count * int(task.flags[-1]))]


def fewest(task: Task, chip: str) -> str:
    """Returns the fewest devices and the GB of each; a dash if too many are needed."""
    for count in COUNTS:
        # Estimates depend on the chip only by its kind, except for times and the memory.
        for one in estimates(task, count, CHIPS[chip].dimensions > 0):
            if dataclasses.replace(one, capacity=CHIPS[chip].memory).fits:
                return f"{count} × {one.memory.total / 1e9:,.1f}"
    return "–"


def on_cpu(task: Task) -> str:
    if task.workload is None:
        return ""
    model = read_preset(ROOT / "configs" / f"{task.preset}.py").model
    plan = plan_inference(model, chip="cpu", workload=task.workload, experts=task.experts)
    return f"{plan.estimates[0].memory.total / 1e9:,.0f} GB"


def table() -> str:
    """Returns all tasks, with the GB of each device."""
    return "\n".join([*header(), *map(row, tasks())])


def short_table() -> str:
    """Returns the tasks of `BRIEF`, with numbers of devices only."""
    named = {task.name: task for task in tasks()}
    rows = [row(dataclasses.replace(named[name], name=brief), False) for name, brief in BRIEF.items()]
    return "\n".join([*header(), *rows])


def header() -> list[str]:
    sizes = [f"{name}<br>{CHIPS[chip].memory / 1e9:,.1f} GB" for chip, name in NAMES.items()]
    return ["| | CPU | " + " | ".join(sizes) + " |", "| --- |" + " ---: |" * (1 + len(sizes))]


def row(task: Task, has_sizes: bool = True) -> str:
    counts = (fewest(task, chip) for chip in NAMES)
    cells = [on_cpu(task), *(count if has_sizes else count.split()[0] for count in counts)]
    return f"| {task.name} | " + " | ".join(cells) + " |"


def written(page: str, start: str = START) -> str | None:
    """Returns the table that a page has after a line, or None."""
    _, found, rest = page.partition(start)
    return rest.partition(END)[0].strip() if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="put the tables into docs/comparison.md and README.md"
    )
    options = parser.parse_args()
    for start, text in ((START, table()), (SHORT, short_table())):
        print(text, end="\n\n")
        for path in PAGES if options.write else ():
            page = path.read_text(encoding="utf-8")
            before, found, rest = page.partition(start)
            if found:
                page = f"{before}{start}\n\n{text}\n\n{END}{rest.partition(END)[2]}"
                path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
