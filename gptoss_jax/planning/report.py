"""The reports of `gptoss plan`: the meshes that fit, their cost, and the best one."""

import dataclasses
import itertools
from collections.abc import Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

from gptoss_jax.hardware import CPU, parameter_counts
from gptoss_jax.planning.compile_tpu import CompiledStep
from gptoss_jax.planning.estimate import MEMORY_UTILIZATION, TPU_MARGIN, Estimate
from gptoss_jax.planning.inference import InferencePlan, rollout_memory
from gptoss_jax.planning.plan import Plan, mesh_name
from gptoss_jax.terminal import format_count, format_si

# Maximum number of meshes in the table.
MAX_ROWS = 6
# Collectives of a compiled step that send fewer bytes are summed.
SMALL = 5e6


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    model, data, best = plan.config.model, plan.config.data, plan.best or plan.estimates[0]
    total, active = parameter_counts(model)
    size = f"{format_count(total)} parameters, {format_count(active)} active per token"
    if model.lora is not None:
        size += f", frozen; {format_count(plan.trained_parameters)} trained"
    step = f"{data.batch_size:,} rows of {data.seq_len:,} tokens: "
    step += f"{format_si(best.useful_flops * plan.devices, 'FLOPs')} useful"
    if best.flops > best.useful_flops:
        step += f", {format_si(best.flops * plan.devices, 'FLOPs')} with remat {model.remat}"
    memory = f"{gigabytes(plan.chip.memory)} GB"
    memory += f" and {format_si(plan.chip.peak, 'FLOP/s')}" if plan.chip.has_times else ""
    for name, text in (
        ("Model", size),
        ("Step", step),
        ("Devices", f"{_devices(plan)}, each {memory}"),
    ):
        console.print(f"[bold]{name:8}[/]{text}", highlight=False)
    sent = [_collectives(best)] if best.collectives and plan.chip.has_times else []
    for table in (_estimates(plan), *sent, *(_compiled(one, plan) for one in plan.compiled)):
        # Printed separately, because the table would wrap them at its width.
        title, caption, table.title, table.caption = table.title, table.caption, None, None
        console.print(f"\n[bold]{title}[/]", highlight=False)
        console.print(table)
        if caption:
            console.print(caption, highlight=False)
    console.print()
    console.print(_verdict(plan), highlight=False)


def _devices(plan: Plan) -> str:
    slices = plan.config.mesh.slices
    within = "in" if slices > 1 else "of"
    of = plan.topology or plan.chip.name
    of = f"{slices} slices of {of}" if plan.topology and slices > 1 else of
    if plan.accelerator_type is None:
        return f"{plan.devices:,} {within} {of}"
    chips = plan.devices // plan.chip.devices_per_chip
    return f"{plan.devices:,} {within} {of} ({plan.accelerator_type}, {chips:,} chip{'s' * (chips > 1)})"


def show_inference(plan: InferencePlan, console: Console) -> None:
    """Prints a plan of inference."""
    total, active = parameter_counts(plan.model)
    best, workload = plan.estimates[0], plan.workload
    context = workload.context or plan.model.max_position_embeddings
    experts = "MXFP4" if plan.model.expert_format == "mxfp4" else "bfloat16"
    slots = f"{workload.slots:,} slot{'s' * (workload.slots > 1)} of {context:,} tokens"
    devices = "CPU" if plan.chip is None else f"{plan.devices:,} of {plan.chip.name}"
    devices += "" if plan.chip is None else f", each {gigabytes(plan.chip.memory)} GB"
    for name, text in (
        ("Model", f"{format_count(total)} parameters, {format_count(active)} active per token"),
        ("Engine", f"{slots}, experts in {experts}"),
        ("Devices", devices),
    ):
        console.print(f"[bold]{name:8}[/]{text}", highlight=False)
    console.print("\n[bold]Estimate from shapes, one device: GB (1e9 bytes)[/]", highlight=False)
    names = ("weights", "cache", "prompts", "prefixes", "temp", "total", "")
    table = _table("", ["mesh"], names)
    table.title = None
    for i, one in enumerate(plan.estimates[:MAX_ROWS]):
        sizes = (*dataclasses.astuple(one.memory), one.memory.total)
        verdict = {True: "[green]fits[/]", False: "[red]no[/]", None: ""}[one.fits]
        table.add_row(mesh_name(one.mesh, ", "), *map(gigabytes, sizes), verdict, style="bold" * (i == 0))
    console.print(table)
    needed = gigabytes(best.memory.total)
    if best.capacity is None:
        console.print(f"Needs {needed} GB of free memory.", highlight=False)
        return
    of = f"{needed} of {gigabytes(best.capacity)} GB"
    verdict = f"[bold green]Best: {mesh_name(best.mesh)}[/], {of}."
    if not best.fits:
        verdict = f"[bold red]No mesh fits[/] in {MEMORY_UTILIZATION:.0%} of the memory. The closest is "
        verdict += f"{mesh_name(best.mesh)}: {of}. Fewer --slots or a shorter --context need less."
    console.print(verdict, highlight=False)


def gigabytes(size: float) -> str:
    """Formats bytes in units of 1e9, without the unit."""
    size /= 1e9
    if 0 < size < 0.005:
        return "<.01"
    return f"{size:,.2f}" if size < 9.995 else f"{size:,.1f}" if size < 99.95 else f"{size:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.3f}" if seconds == 0 or seconds >= 0.0005 else f"{seconds:.0e}"


def _table(title: str, left: Sequence[str], right: Sequence[str], widths: Sequence[int] = ()) -> Table:
    """Returns a table without borders, with left- and right-aligned columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name, width in itertools.zip_longest((*left, *right), widths):
        justify: JustifyMethod = "left" if name in left else "right"
        table.add_column(name, justify=justify, no_wrap=name != "mesh", min_width=width)
    return table


def _estimates(plan: Plan) -> Table:
    title = "Estimate from shapes, one device: GB (1e9 bytes)"
    title += ", seconds at published rates" if plan.chip.has_times else ""
    has_frozen = plan.config.model.lora is not None
    names: tuple[str, ...] = ("frozen", "trained") if has_frozen else ("param",)
    has_process = any(one.memory.process for one in plan.estimates)
    names += ("optim", "grad", "activ", "temp", *["process"] * has_process, "total", "")
    names += ("compute", "send") if plan.chip.has_times else ()
    table = _table(title, ["mesh"], names)
    for i, one in enumerate(plan.estimates[:MAX_ROWS]):
        memory = one.memory
        sizes = (memory.frozen, memory.parameters)[not has_frozen :]
        sizes += (memory.optimizer, memory.gradients, memory.activations, memory.temporaries)
        sizes += (memory.process,) * has_process
        table.add_row(
            mesh_name(one.mesh, ", "),
            *map(gigabytes, (*sizes, memory.total)),
            {"fits": "[green]fits[/]", "close": "[yellow]close[/]", "no": "[red]no[/]"}[one.verdict],
            *map(_seconds, (one.compute_seconds, one.communication_seconds)[: 2 * plan.chip.has_times]),
            style="bold" if i == 0 else "",
        )
    rest, notes = plan.estimates[MAX_ROWS:], []
    if rest:
        counts = {verdict: sum(one.verdict == verdict for one in rest) for verdict in ("fits", "close")}
        others = ", ".join(
            f"{count} of which {name}"
            for name, count in (("fit", counts["fits"]), ("are close", counts["close"]))
            if count
        )
        notes.append(f"and {len(rest)} more meshes, {others or 'which do not fit'}")
    if any(one.verdict == "close" for one in plan.estimates):
        notes.append(f"close: may not fit; compiled steps took up to {TPU_MARGIN} x (activ + temp) more")
    table.caption = "\n".join(notes)
    return table


def _collectives(one: Estimate) -> Table:
    title = f"Sent by one device in a step with {mesh_name(one.mesh)}"
    table = _table(title, ["purpose  ", "collective  ", "axes  "], ["GB", "seconds"])
    for cost in one.collectives:
        table.add_row(
            f"{cost.purpose}  ", f"{cost.kind}  ", f"{' '.join(cost.axes)}  ",
            gigabytes(cost.sent), _seconds(cost.seconds),
        )  # fmt: skip
    return table


def _compiled(one: CompiledStep, plan: Plan) -> Table:
    title = f"Compiled for {plan.topology}, {mesh_name(one.mesh)}, in {one.seconds:,.0f} s: one device"
    table = _table(title, ["compiler's figures", "axes"], ["calls", "GB"], widths=[26, 12, 6, 6])
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
        ("in use at once", one.peak),
        ("available", plan.chip.memory),
    ):
        table.add_row(name, "", "", gigabytes(size))
    table.add_section()
    if one.collectives is None:
        table.caption = "Collectives: this jaxlib cannot read what this libtpu wrote."
        return table
    if any(not entry["trips_known"] for entry in one.collectives if entry["sent"] >= SMALL):
        table.caption = "+: in loops of unknown length, as for an unbalanced router; counted once"
    small = [entry for entry in one.collectives if entry["sent"] < SMALL]
    for entry in one.collectives:
        if entry not in small:
            times = f"{entry['times']:,}" + ("" if entry["trips_known"] else "+")
            sent = "sent to other slices" if entry["across_slices"] else "sent"
            table.add_row(
                f"{entry['kind']}, {sent}", " ".join(entry["axes"]), times, gigabytes(entry["sent"])
            )
    if small:
        times, sent = (sum(entry[name] for entry in small) for name in ("times", "sent"))
        table.add_row(f"others, under {SMALL / 1e6:.0f} MB each", "", f"{times:,}", gigabytes(sent))
    return table


def _verdict(plan: Plan) -> str:
    best = plan.best
    others = (one for one in plan.compiled if best is None or one.mesh != best.mesh)
    lines = [_compiled_verdict(one, plan) for one in others]
    if best is not None:
        compiled = next((one for one in plan.compiled if one.mesh == best.mesh), None)
        size = best.memory.total if compiled is None else compiled.peak
        kind = "Best estimate" if compiled is None else "Best compiled"
        lines.append(
            f"[bold green]{kind}: {mesh_name(best.mesh)}[/], {gigabytes(size)} GB of "
            f"{gigabytes(best.capacity)}."
        )
        lines.append(_bound(best, plan))
        if plan.config.objective == "grpo":
            lines.append(_rollouts(best, plan))
        if plan.chip.dimensions and plan.topology is None:
            lines.append("The memory is an estimate: compile it with --topology.")
    elif not plan.compiled:
        lines.append(_closest(plan.estimates[0]))
    else:
        lines.append(f"[bold red]No compiled mesh fits[/], out of {len(plan.compiled)}.")
    lines += _suggested(plan)
    return "\n".join(lines)


def _bound(one: Estimate, plan: Plan) -> str:
    """Describes the shortest possible duration of a step, and tokens per second."""
    if not plan.chip.has_times:
        return f"No times: only the memory of {plan.chip.name} is known."
    data, soonest, latest = plan.config.data, one.overlapped_seconds, one.serial_seconds
    text = f"A step takes at least {format_si(soonest, 's')}"
    if one.collectives:
        text += f" with full overlap, {format_si(latest, 's')} with none"
    rate = format_count(data.batch_size * data.seq_len / soonest)
    note = "This is a bound at published peak rates, not a measurement."
    if plan.config.model.expert_format == "mxfp4":
        note += " It omits dequantizing MXFP4."
    return f"{text}: at most {rate} tokens/s.\n{note}"


def _rollouts(one: Estimate, plan: Plan) -> str:
    """Describes the memory for sampling the answers of a step."""
    data = plan.config.data
    sampling = rollout_memory(plan.config, plan.chip, one.mesh)
    instead = one.memory.activations + one.memory.temporaries + one.memory.gradients
    return (
        f"Between steps, sampling {data.batch_size} answers needs {gigabytes(sampling)} GB per device for "
        f"keys, values and logits, when the {gigabytes(instead)} GB of grad, activ and temp are free."
    )


def _closest(one: Estimate) -> str:
    closest = f"The closest is {mesh_name(one.mesh)}: {gigabytes(one.memory.total)} GB"
    closest += f" of {gigabytes(one.capacity)}"
    if one.verdict == "close":
        more = f"but compiled steps like it took up to {gigabytes(one.margin)} GB more"
        advice = "Compile it with --topology to know."
        return f"[bold yellow]No mesh is sure to fit.[/] {closest}, {more}. {advice}"
    return f"[bold red]No mesh fits[/] in {MEMORY_UTILIZATION:.0%} of the memory. {closest}."


def _compiled_verdict(one: CompiledStep, plan: Plan) -> str:
    fits = "[green]fits[/]" if one.fits else "[red]does not fit[/]"
    size = one.peak if one.fits else one.needed
    sizes = f", {gigabytes(size)} GB of {gigabytes(one.available or plan.chip.memory)}" if size else ""
    return f"Compiled: {mesh_name(one.mesh)} {fits}{sizes}."


def _suggested(plan: Plan) -> list[str]:
    if plan.suggestion is None:
        would_help = plan.best is None and plan.chip.name != CPU
        return ["More devices need less memory each."] if would_help else []
    flag, one = plan.suggestion.flag, plan.suggestion.estimate
    size = f"{mesh_name(one.mesh)}, {gigabytes(one.memory.total)} GB of {gigabytes(one.capacity)}"
    if plan.best is None:
        return [f"With [bold]{flag}[/], the estimate fits: {size}."]
    rows = plan.config.data.batch_size // plan.config.optim.grad_accum_steps
    count = f"{rows} row{'s' * (rows > 1)}"
    return [
        f"A microbatch of {count} cannot be split over {plan.devices} devices. With [bold]{flag}[/]: {size}; "
        f"a step takes at least {format_si(one.overlapped_seconds, 's')}."
    ]
