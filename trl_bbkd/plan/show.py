"""A plan as tables and sentences."""

import math
import shlex
from collections.abc import Collection, Iterator

from ..reports.report import arguments_without_secrets
from ..reports.report import duration as minutes
from .footprint import Footprint
from .memory import DEVICES_OF_A_MACHINE, GIB, EngineName
from .plan import Case, Plan
from .reading import accumulation_for


TITLES: dict[EngineName, str] = {"ddp": "DDP", "zero2": "ZeRO-2", "hsdp": "HSDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}
HSDP_MACHINES = 2  # in recipes/accelerate_configs/hsdp.yaml, each of DEVICES_OF_A_MACHINE
ESTIMATE = (
    "Within 15 % of what was measured: one GPU, models shaped like Qwen of 0.5 to 7 billion parameters. All else is an "
    "estimate: other models, more GPUs, vLLM, and every time."
)


def print_plan(plan: Plan, name: str, overrides: Collection[str] = (), console=None) -> None:
    """Print a plan of the recipe `name`, which was read with overrides."""
    from rich.console import Console

    console = console or Console(highlight=False)
    console.print(memory_table(plan, name))
    console.print(ways_table(plan))
    case = plan.recommended
    if case is not None:
        console.print(time_table(plan, case))
    for sentence in sentences(plan, name, list(overrides)):
        console.print(sentence, markup=False, soft_wrap=True)


def memory_table(plan: Plan, name: str):
    """What is on a GPU under each engine, in GiB, in the phase that takes most."""
    from rich.table import Table

    table = Table(title=f"{name}: GiB on {each_gpu(plan)}", caption="* the largest moment")
    table.add_column("")
    for engine in plan.own:
        table.add_column(title(plan, engine), justify="right")
    cases = list(plan.own.values())
    footprints = [case.footprints[case.largest] for case in cases]
    if len(cases[0].phases) > 1:
        phases = (case.phases[case.largest].name.removeprefix("the ") for case in cases)
        table.add_row("phase that takes most", *phases)
        table.add_section()
    for key in dict.fromkeys(key for found in footprints for key in found.kept):
        table.add_row(": ".join(key), *(gib(found.kept.get(key, 0.0)) for found in footprints))
    for moment in dict.fromkeys(moment for found in footprints for moment in found.moments):
        table.add_section()
        table.add_row(moment, *(moment_cell(found, moment) for found in footprints))
        all_parts = [found.moments.get(moment, {}) for found in footprints]
        for part in dict.fromkeys(part for parts in all_parts for part in parts):
            if any(parts.get(part) for parts in all_parts):
                table.add_row(f"  {part}", *(gib(parts.get(part, 0.0)) for parts in all_parts), style="dim")
    table.add_section()
    table.add_row("allocator, CUDA", *(gib(found.reserve) for found in footprints))
    table.add_row("peak", *(gib(found.total) for found in footprints), style="bold")
    return table


def moment_cell(found: Footprint, moment: str) -> str:
    mark = "* " if moment == found.largest else ""
    return mark + gib(sum(found.moments.get(moment, {}).values()))


def ways_table(plan: Plan):
    """What fits: of each way and engine the peak, and the largest batch."""
    from rich.table import Table

    table = Table(
        title="What fits: peak, and the largest per_device_train_batch_size",
        caption="tried up to the rows of a step",
    )
    table.add_column("")
    for engine in plan.own:
        table.add_column(title(plan, engine), justify="right")
    own = plan.way.name if plan.way is not None else "mixed"
    table.add_row(f"{own} (the recipe)", *map(cell, plan.own.values()), style="bold")
    for name, cases in plan.others.items():
        table.add_row(name, *map(cell, cases.values()))
    return table


def time_table(plan: Plan, case: Case):
    """Operations and seconds of a step, by its parts."""
    from rich.table import Table

    machine = plan.machine
    assumption = f"{machine.utilization:.0%} of {machine.tflops:g} TFLOP/s (assumed)"
    where = f"under {title(plan, case.engine)}" if machine.gpus > 1 else "on one GPU"
    table = Table(title=f"A step {where}, with {assumption}")
    table.add_column("")
    for column in ("TFLOP, all GPUs", "s", "of the step"):
        table.add_column(column, justify="right")
    for phase, parts in plan.parts(case):
        if len(case.phases) > 1:
            table.add_section()
            table.add_row(phase.name, style="bold")
        whole = sum(part.took for part in parts)
        for part in parts:
            note = " (exchange)" if part.waits_for_weights else ""
            tera = f"{part.operations * machine.gpus / 1e12:,.0f}"
            table.add_row(part.name + note, tera, f"{part.took:,.2f}", f"{part.took / whole:.0%}")
        tera = f"{sum(part.operations for part in parts) * machine.gpus / 1e12:,.0f}"
        table.add_row("together", tera, f"{whole:,.2f}", "")
    return table


def sentences(plan: Plan, name: str, overrides: list[str]) -> Iterator[str]:
    case = plan.recommended
    yield from refusals(plan)
    if plan.store_bytes:
        unit, size = ("GB", 1e9) if plan.store_bytes > 1e9 else ("MB", 1e6)
        yield f"Soft targets on disk: up to {plan.store_bytes / size:,.0f} {unit}."
    if case is None:
        yield f"{name} fits nowhere. {lacking(plan)}"
        yield "What makes it fit, the nearest first:" if plan.changes else smaller(plan)
        for change in plan.changes:
            engine = title(plan, change.engine)
            yield f"  {change.text}: {gib(change.total)} GiB under {engine}, batches of up to {change.batch}"
        yield ESTIMATE
        return
    yield bottleneck(plan, case)
    yield f"Every row is taken to be as long as the recipe lets it be: {case.phases[-1].tokens:,} tokens."
    yield from run_sentences(plan, case)
    yield f"Train it with: {command(plan, case, name, overrides)}"
    if plan.machine.gpus > DEVICES_OF_A_MACHINE:
        yield "Run that on each machine, with its --machine_rank and the first one's --main_process_ip."
    yield ESTIMATE


def refusals(plan: Plan) -> Iterator[str]:
    """Why engines refuse the recipe, each reason once."""
    found: dict[str, list[str]] = {}
    for engine, case in plan.own.items():
        if case.refusal:
            found.setdefault(case.refusal, []).append(title(plan, engine))
    for reason, titles in found.items():
        yield f"Refused under {', '.join(titles)}: {reason}"


def run_sentences(plan: Plan, case: Case) -> Iterator[str]:
    run = plan.run_time(case)
    if run is None:
        yield "How long the run takes needs the number of training rows: --rows."
        return
    yield f"{run.steps:,} steps of the student: {duration(run.training)}."
    if run.plan is not None:
        share = run.evaluation / (run.evaluation + run.training)
        sampled = run.plan.all / (run.plan.all + run.samples)
        yield (
            f"The report samples {run.plan.all:,} completions, {sampled:.0%} of the run's: "
            f"{duration(run.evaluation)}, {share:.0%} of its time."
        )
        if share > 0.5:
            batch = plan.recipe.training_args.per_device_eval_batch_size
            yield f"That is the run's bottleneck: raise per_device_eval_batch_size, which is {batch}, or lower eval_prompts."


def bottleneck(plan: Plan, case: Case) -> str:
    """What takes most of the time, and most of the memory."""
    part = max((part for _, parts in plan.parts(case) for part in parts), key=lambda part: part.took)
    why = ", which waits for weights from other GPUs" if part.waits_for_weights else ""
    found = case.footprints[case.largest]
    parts = {": ".join(key): value for key, value in found.kept.items()}
    parts |= {f"{found.largest}: {name}": value for name, value in found.moments[found.largest].items()}
    largest = max(parts, key=lambda name: parts[name])
    return f"Bottleneck of a step: {part.name}{why}. Most memory: {largest}, {gib(parts[largest])} of {gib(found.total)} GiB."


def lacking(plan: Plan) -> str:
    """How far the nearest engine is from fitting, and what is largest there."""
    possible = [case for case in plan.own.values() if not case.refusal]
    if not possible:
        return "No engine that shards takes 4-bit weights, and without one they do not fit."
    case = min(possible, key=lambda case: case.total)
    found = case.footprints[case.largest]
    return (
        f"The nearest is {title(plan, case.engine)}: {gib(found.total)} GiB of {plan.machine.gpu_memory:g}, when "
        f"{found.largest}."
    )


def smaller(plan: Plan) -> str:
    """What to do where no setting helps: the model that takes most is too large."""
    case = min((case for case in plan.own.values() if not case.refusal), key=lambda case: case.total, default=None)
    case = case or next(iter(plan.own.values()))
    kept = case.footprints[case.largest].kept
    models = case.phases[case.largest].models
    takes = {model.key: sum(value for (name, _), value in kept.items() if name == model.name) for model in models}
    return f"No setting that was tried makes it fit: take a smaller --{max(takes, key=lambda key: takes[key])}."


def command(plan: Plan, case: Case, name: str, overrides: list[str]) -> str:
    """The command that trains the recipe so."""
    words = [shlex.join(["trl-bbkd", "train", name, *arguments_without_secrets(overrides)])]
    words += [f"--accelerate_config {case.engine}"] if plan.machine.gpus > 1 else []
    machines = math.ceil(plan.machine.gpus / DEVICES_OF_A_MACHINE)
    words += [f"--num_machines {machines}"] if machines > 1 else []
    words += [f"--num_processes {plan.machine.gpus}"]
    if case.engine == "hsdp" and machines != HSDP_MACHINES:
        words += [f"--parallelism_config_dp_replicate_size {machines}"]
    if not case.fits:
        batch = case.largest_batch
        words += [f"--per_device_train_batch_size {batch}"]
        words += [f"--gradient_accumulation_steps {accumulation_for(plan.recipe, batch)}"]
    return " ".join(words)


def cell(case: Case) -> str:
    if case.refusal:
        return "refused"
    return f"{gib(case.total)}, {case.largest_batch or 'no'}"


def each_gpu(plan: Plan) -> str:
    machine = plan.machine
    return f"{'one GPU' if machine.gpus == 1 else f'each of {machine.gpus} GPUs'} of {machine.gpu_memory:g}"


def title(plan: Plan, engine: EngineName) -> str:
    return TITLES[engine] if plan.machine.gpus > 1 or engine != "ddp" else "one GPU"


def duration(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 2 * 3600 else minutes(seconds)


def gib(count: float) -> str:
    return f"{count / GIB:,.1f}" if count else "–"
