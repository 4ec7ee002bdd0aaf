"""A plan as text: what fits, what it costs, and which mesh to take."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from gptoss_jax.hardware import parameter_counts
from gptoss_jax.planning.compiled import Compiled
from gptoss_jax.planning.estimate import ROOM, Estimate

if TYPE_CHECKING:
    from gptoss_jax.planning.report import Plan

SHOWN = 6


def mesh_name(mesh: Mapping[str, int], separator: str = ",") -> str:
    """Such as "fsdp=16,expert=4", as `--mesh` takes it; axes of one device are left out."""
    return separator.join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def gigabytes(size: float) -> str:
    size /= 1e9
    if 0 < size < 0.005:
        return "<.01"
    return f"{size:,.2f}" if size < 9.995 else f"{size:,.1f}" if size < 99.95 else f"{size:,.0f}"


def count(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 0.9995 else f"{seconds * 1e3:.1f} ms"


def show(plan: "Plan", console: Console) -> None:
    """Prints a plan."""
    model, data, best = plan.config.model, plan.config.data, plan.estimates[0]
    total, active = parameter_counts(model)
    useful, done = best.useful_flops * plan.devices / 1e15, best.flops * plan.devices / 1e15
    twice = f", {done:,.3g} with remat {model.remat}" if done > useful else ""
    for name, text in (
        ("Model", f"{count(total)} parameters, {count(active)} active for a token"),
        (
            "Step",
            f"{data.batch_size:,} rows of {data.seq_len:,} tokens: {useful:,.3g} useful PFLOPs{twice}",
        ),
        (
            "Devices",
            f"{plan.devices:,} of {plan.topology or plan.chip.name}, each "
            f"{gigabytes(plan.chip.memory)} GB and {plan.chip.peak / 1e12:,.0f} TFLOP/s",
        ),
    ):
        console.print(f"[bold]{name:8}[/]{text}", highlight=False)
    tables = (_meshes(plan), _traffic(best), *(_compiled(one, plan) for one in plan.compiled))
    for table in tables:
        # The table itself would wrap them at its own width.
        title, caption, table.title, table.caption = table.title, table.caption, None, None
        console.print(f"\n[bold]{title}[/]", highlight=False)
        console.print(table)
        if caption:
            console.print(caption, highlight=False)
    console.print()
    console.print(_verdict(plan), highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)


def _meshes(plan: "Plan") -> Table:
    table = _table("Estimate from shapes, one device: GB (1e9 bytes), seconds at published rates")
    table.add_column("mesh")
    for name in ("param", "optim", "grad", "activ", "temp", "total", "", "compute", "send"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, one in enumerate(plan.estimates[:SHOWN]):
        memory = one.memory
        sizes = (memory.parameters, memory.optimizer, memory.gradients, memory.activations)
        table.add_row(
            mesh_name(one.mesh, ", "),
            *map(gigabytes, (*sizes, memory.temporaries, memory.total)),
            "[green]fits[/]" if one.fits else "[red]no[/]",
            f"{one.compute_seconds:,.3f}",
            f"{one.communication_seconds:,.3f}",
            style="bold" if i == 0 else "",
        )
    left = len(plan.estimates) - SHOWN
    if left > 0:
        fitting = sum(one.fits for one in plan.estimates[SHOWN:])
        table.caption = f"and {left} more meshes, of which {fitting} fit"
    return table


def _traffic(one: Estimate) -> Table:
    table = _table(f"What a device sends in a step with {mesh_name(one.mesh)}")
    for name in ("exchange  ", "collective  ", "along  "):
        table.add_column(name, no_wrap=True)
    for name in ("GB sent", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for traffic in one.traffic:
        table.add_row(
            f"{traffic.what}  ", f"{traffic.kind}  ", f"{' '.join(traffic.axes)}  ",
            gigabytes(traffic.sent), f"{traffic.seconds:,.3f}",
        )  # fmt: skip
    if not one.traffic:
        table.add_row("nothing")
    return table


def _compiled(one: Compiled, plan: "Plan") -> Table:
    table = _table(
        f"Compiled for {plan.topology}, {mesh_name(one.mesh)}, in {one.seconds:,.0f} s: one device"
    )
    table.add_column("compiler's figures", min_width=26)
    table.add_column("along", min_width=12)
    table.add_column("times", justify="right", min_width=6)
    table.add_column("GB", justify="right", min_width=6)
    if not one.fits:
        if one.needed:
            table.add_row("needed", "", "", gigabytes(one.needed))
        table.add_row("available", "", "", gigabytes(one.available or plan.chip.memory))
        table.caption = one.refusal
        return table
    for name, size in (
        ("arguments", one.arguments),
        ("outputs in new memory", one.outputs - one.aliased),
        ("temporaries", one.temporaries),
        ("program", one.code),
        ("[bold]sum of these", one.total),
        ("alive at once", one.peak),
        ("available", plan.chip.memory),
    ):
        table.add_row(name, "", "", gigabytes(size))
    table.add_section()
    if one.collectives is None:
        table.caption = "Collectives: this jaxlib cannot read what this libtpu wrote."
        return table
    if any(not entry["trips_known"] for entry in one.collectives):
        table.caption = "+: in loops that run as often as the data asks; each counts once."
    small = [entry for entry in one.collectives if entry["sent"] < 5e6]
    for entry in one.collectives:
        if entry not in small:
            times = f"{entry['times']:,}" + ("" if entry["trips_known"] else "+")
            table.add_row(f"{entry['kind']}, sent", " ".join(entry["axes"]), times, gigabytes(entry["sent"]))
    if small:
        times, sent = (sum(entry[name] for entry in small) for name in ("times", "sent"))
        table.add_row("others, under 5 MB each", "", f"{times:,}", gigabytes(sent))
    return table


def _verdict(plan: "Plan") -> str:
    best = plan.estimates[0]
    name, room = mesh_name(best.mesh), f"{gigabytes(best.memory.total)} of {gigabytes(best.capacity)} GB"
    if not best.fits:
        verdict = f"[bold red]Nothing fits[/] in {ROOM:.0%} of the memory; least takes {name}: {room}."
    else:
        useful = best.useful_flops / plan.chip.peak
        soonest, latest = best.overlapped_seconds, best.serial_seconds
        verdict = (
            f"[bold green]Best: {name}[/], {room}; {duration(soonest)} a step if all overlaps "
            f"({useful / soonest:.0%} MFU), {duration(latest)} if nothing does ({useful / latest:.0%})."
        )
    for one in plan.compiled:
        fits = "[bold green]fits[/]" if one.fits else "[bold red]does not fit[/]"
        verdict += f"\nCompiled: {mesh_name(one.mesh)} {fits}."
    return verdict
