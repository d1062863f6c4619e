"""What the planner found, as tables and as one JSON document."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from w2s.planning.plan import Plan, Plans
from w2s.planning.request import Request
from w2s.planning.run_time import Images, RunTime, run_time
from w2s.planning.scaling import BEND, Scaling
from w2s.planning.time.cards import Card
from w2s.planning.time.duration import WORDS
from w2s.tracking.tables import Cell, Table

_GIB = 2**30
_NOT_COUNTED = "evaluations are left out: eval.shards={} cannot be counted here, say its images with --eval-images N"
_WARNING = "predicted, not measured: no plan has been compared with a run on GPUs yet"


@dataclass(frozen=True)
class Answer:
    """What was asked of `w2s plan`, and what it found."""

    request: Request
    """What was asked for."""
    card: Card
    """The GPUs."""
    plans: Mapping[str, Plans]
    """The plans of each stage."""
    images: Mapping[str, Images | None]
    """What an evaluation of each stage sees, where that is known."""
    scaling: Mapping[str, Scaling]
    """The simulation of each stage, if one was asked for."""


def document(answer: Answer) -> Any:
    """Return everything as JSON takes it."""
    card, images = answer.card, answer.images
    return {
        "command": answer.request.command,
        "note": _WARNING,
        "gpus": answer.request.gpus,
        "card": asdict(card),
        "usable_gib": card.usable_bytes / _GIB,
        "stages": {stage: _stage(plans, card, images[stage]) for stage, plans in answer.plans.items()},
        "scaling": {stage: _scaling(points) for stage, points in answer.scaling.items()},
    }


def print_report(answer: Answer) -> None:
    """Print the layouts of each stage, the fastest first, and what its fastest needs."""
    console, card, images = Console(highlight=False), answer.card, answer.images
    for stage, plans in answer.plans.items():
        best = plans.fastest[0]
        train = best.config.train
        console.print(
            f"{best.config.model.name} {stage} on {answer.request.gpus} x {card.name}: {train.steps:,} steps of "
            f"{train.global_batch:,} samples; {plans.fitting:,} of {plans.legal:,} layouts fit into "
            f"{card.usable_bytes / _GIB:.1f} GiB"
        )
        console.print(_layouts(plans).to_rich())
        console.print(_parts(best).to_rich())
        console.print(bottleneck(best), end="\n\n")
        console.print(_run_table(run_time(best, card, images[stage])).to_rich())
        if images[stage] is None:
            console.print(_NOT_COUNTED.format(best.config.eval.shards))
        if best.config.checkpoint.memory:
            console.print(_in_memory(best))
    for stage, points in answer.scaling.items():
        console.print(_scaling_table(stage, points).to_rich())
        console.print(_bend(points))
    console.print(_WARNING)


def bottleneck(plan: Plan) -> str:
    """Say in a line what the step spends its time on."""
    parts = sorted(asdict(plan.time).items(), key=lambda part: -part[1])
    words = [f"{WORDS[name]} {100 * seconds / plan.seconds:.0f} %" for name, seconds in parts[:4] if seconds]
    return f"bottleneck: {words[0]} of the step; then {', '.join(words[1:])}"


def _in_memory(plan: Plan) -> str:
    host = plan.host
    return (
        f"a checkpoint in memory: {host.bytes / _GIB:.1f} GiB of a rank in {host.seconds:.1f} s; "
        f"{host.held / _GIB:.1f} GiB of its host's memory (two checkpoints, its own and the host before's)"
    )


def _stage(plans: Plans, card: Card, images: Images | None) -> dict[str, Any]:
    best = plans.fastest[0]
    run = run_time(best, card, images)
    return {
        "model": best.config.model.name,
        "teacher": " + ".join(teacher.name for teacher in best.config.stage_teachers) or None,
        "global_batch": best.config.train.global_batch,
        "steps": best.config.train.steps,
        "model_tflop_per_sample": best.flops.model / 1e12,
        "layouts_legal": plans.legal,
        "layouts_fitting": plans.fitting,
        "bottleneck": bottleneck(best),
        "run": {"days": run.days, **asdict(run)},
        "layouts": [_plan(plan) for plan in plans.fastest],
    }


def _plan(plan: Plan) -> dict[str, Any]:
    parallel = plan.config.parallel
    return {
        "tensor": parallel.tensor,
        "sequence": parallel.sequence,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "micro_batch_group": parallel.micro_batch_group,
        "data": plan.data_size,
        "shard": parallel.shard,
        "micro_batch": plan.config.train.micro_batch,
        "recompute": parallel.recompute,
        "recompute_layers": parallel.recompute_layers,
        "seconds_per_step": plan.seconds,
        "seconds_per_step_from_to": [plan.fast, plan.slow],
        "samples_per_second": plan.samples_per_second,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "bottleneck": plan.time.bottleneck,
        "seconds": asdict(plan.time),
        "gib": {name: count / _GIB for name, count in asdict(plan.memory).items()},
        "total_gib": plan.memory.total / _GIB,
        "checkpoint_in_memory": asdict(plan.host),
    }


def _scaling(scaling: Scaling) -> dict[str, Any]:
    return {
        "bend": scaling.bend,
        "reason": scaling.reason,
        "points": [
            {"gpus": point.gpus, "efficiency": point.efficiency, "plan": point.plan and _plan(point.plan)}
            for point in scaling.points
        ],
    }


_COLUMNS = ("layout", "VPP", "micro", "recompute", "GiB", "s/step", "from - to", "MFU %")


def _layouts(plans: Plans) -> Table:
    return Table("", _COLUMNS, [_cells(plan) for plan in plans.fastest])


def _cells(plan: Plan) -> list[Cell]:
    parallel = plan.config.parallel
    group = f" by {parallel.micro_batch_group}" if parallel.micro_batch_group else ""
    return [
        _split(plan),
        f"{parallel.virtual_pipeline}{group}" if parallel.virtual_pipeline > 1 else "",
        plan.config.train.micro_batch,
        parallel.recompute + (f" {parallel.recompute_layers}" if parallel.recompute_layers else ""),
        round(plan.memory.total / _GIB, 1),
        plan.seconds,
        f"{plan.fast:.3g} - {plan.slow:.3g}",
        round(100 * plan.mfu, 1),
    ]


def _split(plan: Plan) -> str:
    """How a model is split: `TP2+SP PP2 DP64`, `DP256 FSDP`."""
    parallel = plan.config.parallel
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "DP": plan.data_size}
    split = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one GPU"
    split = split.replace(" ", "+SP ", 1) if parallel.sequence else split
    return f"{split} FSDP" if parallel.shard == "full" else split


def _run_table(run: RunTime) -> Table:
    """What a run is made of."""
    parts = {"steps": run.steps, "checkpoints": run.checkpoints, "evaluations": run.evaluations}
    rows: list[list[Cell]] = [
        [name, part.times, part.seconds, round(part.days, 4), round(100 * part.days / run.days, 1)]
        for name, part in parts.items()
        if part and part.times
    ]
    rows.append(["all", None, None, run.days, None])
    return Table("a run of the fastest layout", ["part", "times", "s each", "days", "%"], rows)


def _parts(plan: Plan) -> Table:
    """Memory and time of a plan side by side."""
    memory = [(name, count / _GIB) for name, count in asdict(plan.memory).items() if count]
    time = sorted(((WORDS[name], s) for name, s in asdict(plan.time).items() if s), key=lambda part: -part[1])
    length = max(len(memory), len(time))
    left = [*memory, *[(None, None)] * (length - len(memory))]
    right = [*time, *[(None, None)] * (length - len(time))]
    rows: list[list[Cell]] = [
        [name, gib, part, seconds and 1e3 * seconds, seconds and round(100 * seconds / plan.seconds, 1)]
        for (name, gib), (part, seconds) in zip(left, right, strict=True)
    ]
    return Table("the fastest layout", ["memory of a GPU", "GiB", "time of a step", "ms", "%"], rows)


def _scaling_table(stage: str, scaling: Scaling) -> Table:
    rows: list[list[Cell]] = []
    for point in scaling.points:
        efficiency = None if point.efficiency is None else round(100 * point.efficiency, 1)
        rows.append([point.gpus, efficiency, *_in_short(point.plan)])
    columns = ["GPUs", "efficiency %", "layout", "GiB", "s/step", "MFU %", "days of steps"]
    return Table(f"{stage} on more GPUs", columns, rows)


def _in_short(plan: Plan | None) -> list[Cell]:
    if plan is None:
        return ["does not fit", None, None, None, None]
    return [_split(plan), round(plan.memory.total / _GIB, 1), plan.seconds, round(100 * plan.mfu, 1), plan.days]


def _bend(scaling: Scaling) -> str:
    grown = f"; what grew most is {WORDS[scaling.reason]}" if scaling.reason else ""
    if scaling.bend is None:
        return f"a GPU gives at least {100 * BEND:.0f} % of what it gives on the fewest, everywhere{grown}"
    return f"scaling bends at {scaling.bend} GPUs, where a GPU gives less than {100 * BEND:.0f} %{grown}"
