"""What a rehearsal found, as tables and as one JSON document."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from rich.console import Console

from w2s.bench.marks import REST
from w2s.planning.time.cards import GPUS_PER_NODE
from w2s.rehearsal.rehearsal import Rehearsal
from w2s.rehearsal.tape import MESSAGES, Call, Compute, Tape
from w2s.rehearsal.timeline import Kind
from w2s.tracking.tables import Cell, Table

_GIB = 2**30


def document(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return everything as JSON takes it."""
    return {
        "gpus": rehearsal.world_size,
        "card": rehearsal.card.name,
        "wrong": rehearsal.wrong,
        "looked_for_data": rehearsal.looked_for_data,
        "seconds_per_step": rehearsal.timeline.steps[-1] if rehearsal.timeline.steps else None,
        "ranks": [
            {
                "rank": report.tape.rank,
                "peak_gib": report.peak / _GIB,
                "parts_gib": {name: size / _GIB for name, size in report.parts.items()},
                "fullest": report.fullest,
                "written_gib": report.written / _GIB,
                "planned_gib": rehearsal.planned[report.tape.rank].total / _GIB,
                "planned_parts_gib": {
                    name: size / _GIB for name, size in asdict(rehearsal.planned[report.tape.rank]).items()
                },
                "failure": report.failure,
                "calls": [_called(call, report.tape) for call in report.tape.last_step if isinstance(call, Call)],
            }
            for report in rehearsal.ranks
        ],
        "calls": _calls(rehearsal),
    }


def print_report(rehearsal: Rehearsal) -> None:
    """Print memory, calls, times, and what is wrong."""
    console = Console(highlight=False)
    config = rehearsal.config
    console.print(
        f"{config.model.name} {config.stage} on {rehearsal.world_size} x {rehearsal.card.name}: "
        f"{len(rehearsal.ranks)} of {rehearsal.world_size} ranks rehearsed"
    )
    if rehearsal.ranks:
        console.print(_memory(rehearsal).to_rich())
    if rehearsal.timeline.steps:
        console.print(_time(rehearsal).to_rich())
        console.print(_table(rehearsal).to_rich())
        console.print(f"a step takes {rehearsal.timeline.steps[-1]:.3g} s in the simulation")
        console.print(_checkpoint(rehearsal))
    for line in rehearsal.wrong:
        console.print(f"wrong: {line}", soft_wrap=True)
    if not rehearsal.looked_for_data:
        console.print("the data were not looked for")
    if not rehearsal.wrong:
        console.print("nothing is wrong: all ranks agree, fit, and never wait for the GPU")


def _called(call: Call, tape: Tape) -> dict[str, Any]:
    """One of the calls of a rank's last step, which are listed in order."""
    whom = {"peer": call.peer} if call.kind in MESSAGES else {}
    of = {"kind": call.kind, "group": tape.groups[call.group].name, "tensors": call.tensors}
    return {**of, "reduction": call.reduction, **whom, "part": call.part, "where": call.where}


def _memory(rehearsal: Rehearsal) -> Table:
    rows: list[list[Cell]] = []
    for report in rehearsal.ranks:
        planned = rehearsal.planned[report.tape.rank].total
        ratio = report.peak / planned if planned else 0.0
        rows.append(
            [report.tape.rank, _gib(report.built), _gib(report.peak), _gib(planned), round(ratio, 3), report.fullest]
        )
    return Table("memory of a GPU, GiB", ["rank", "before steps", "peak", "planned", "peak / planned", "peak at"], rows)


def _checkpoint(rehearsal: Rehearsal) -> str:
    """What each rank writes, and what the ranks of a host hold of it in its memory until it is written."""
    most = max(report.written for report in rehearsal.ranks)
    least = min(report.written for report in rehearsal.ranks)
    size = f"{_gib(most)}" if most == least else f"{_gib(least)} to {_gib(most)}"
    on_host = min(GPUS_PER_NODE, rehearsal.world_size) * most
    return f"a checkpoint is {size} GiB in two files from each rank, up to {_gib(on_host)} GiB of a host's memory"


def _time(rehearsal: Rehearsal) -> Table:
    """Seconds of each part of the last step, and what a rank waits for others."""
    parts: list[str] = []
    columns: list[dict[str, float]] = []
    for report in rehearsal.ranks:
        seconds: dict[str, float] = defaultdict(float)
        for event in report.tape.last_step:
            if isinstance(event, Compute):
                seconds[event.part] += event.seconds
        columns.append(seconds)
        parts += [part for part in seconds if part not in parts]
    order = sorted(parts, key=lambda part: part == REST)
    rows: list[list[Cell]] = [
        [report.tape.rank, *(round(1e3 * seconds[part], 1) for part in order), round(1e3 * sum(seconds.values()), 1)]
        for report, seconds in zip(rehearsal.ranks, columns, strict=True)
    ]
    return Table("work of a GPU in a step, ms", ["rank", *order, "all"], rows)


def _table(rehearsal: Rehearsal) -> Table:
    rows: list[list[Cell]] = []
    for of_kind in _calls(rehearsal):
        *kind, gib, busy, exposed = of_kind.values()
        rows.append([*kind, round(gib, 2), round(1e3 * busy, 1), round(1e3 * exposed, 1)])
    return Table(
        "calls between GPUs in a step, of the rank with most",
        ["group", "ranks", "call", "calls", "GiB", "ms", "ms waited"],
        rows,
    )


def _calls(rehearsal: Rehearsal) -> list[dict[str, Any]]:
    """The calls of a step by kind, of the rank with most: `exposed` are seconds that a GPU waits for them."""
    most: dict[Kind, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for report in rehearsal.ranks:
        sizes: dict[Kind, list[int]] = defaultdict(list)
        for event in report.tape.last_step:
            if isinstance(event, Call):
                group = report.tape.groups[event.group]
                sizes[group.name, len(group.ranks), event.kind].append(event.size)
        for kind, of_kind in sizes.items():
            calls, gib = most[kind]
            most[kind] = max(calls, len(of_kind)), max(gib, sum(of_kind) / _GIB)
    found = []
    for kind, (calls, gib) in most.items():
        group_name, ranks, name = kind
        busy, exposed = rehearsal.timeline.spent.get(kind, (0.0, 0.0))
        figures = {"calls": calls, "gib": gib, "seconds": busy, "exposed": exposed}
        found.append({"group": group_name, "ranks": ranks, "kind": name, **figures})
    return found


def _gib(size: int) -> float:
    return round(size / _GIB, 2)
