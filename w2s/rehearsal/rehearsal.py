"""A rehearsal: its ranks one after the other, as many at a time as there are cores, and what they come to together."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar
from unittest import mock

import torch

from w2s.config import gpu
from w2s.config.checks import check
from w2s.config.sections import Config, TeacherConfig, TeacherEntry
from w2s.data.shards.listing import list_shards
from w2s.data.stream.sources import find_sources
from w2s.errors import UserError, W2SError
from w2s.planning.memory.planned_stage import PlannedStage
from w2s.planning.memory.rank_memory import Memory, rank_memory
from w2s.planning.model.teacher import planned_teachers
from w2s.planning.time.cards import GPUS_PER_NODE, Card
from w2s.processes.stopping import end_with_parent
from w2s.rehearsal.agreement import Disagreement, disagreements
from w2s.rehearsal.kinds import stage_of
from w2s.rehearsal.rank import Job, RankReport, rehearse
from w2s.rehearsal.tape import HostWait
from w2s.rehearsal.timeline import Timeline, play

T = TypeVar("T", TeacherConfig, TeacherEntry)


@dataclass(frozen=True)
class Rehearsal:
    """What came of it."""

    config: Config
    world_size: int
    card: Card
    ranks: list[RankReport]
    planned: dict[int, Memory]
    """Memory by rank as the planner has it."""
    timeline: Timeline
    wrong: list[str]
    """What would end the run, hang it, or make it wait: a line each."""
    looked_for_data: bool = False
    """Whether shards were looked for."""


def run(
    config: Config, world_size: int, card: Card, ranks: Sequence[int], steps: int, *, data: bool = True
) -> Rehearsal:
    """Rehearse some ranks of a stage in its layout.

    Args:
        steps: of each rank; memory and times are those of the last one.
        data: whether shards are looked for, as the run does at its start; without them nothing more is rehearsed.

    Raises:
        UserError: it cannot be rehearsed.
    """
    _check_rehearsed(config)
    refused = _refusal(config, world_size, card)
    looked = data and not refused
    refused = refused or (_missing(config, world_size) if looked else "")
    if refused:
        return Rehearsal(config, world_size, card, [], {}, Timeline(), [refused], looked)
    jobs = [Job(_without_files(config), rank, world_size, steps, card) for rank in ranks]
    return replace(conclude(config, world_size, card, perform(rehearse, jobs)), looked_for_data=looked)


def perform(be: Callable[[Job], RankReport], jobs: Sequence[Job]) -> list[RankReport]:
    """Let a process each be the ranks of some jobs."""
    # Much of a rank is for ever, so a process takes one alone; what they all import is imported once.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([rehearse.__module__, "timm", "torch._dynamo"])
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=processes, initializer=end_with_parent, max_tasks_per_child=1
    ) as pool:
        return list(pool.map(be, jobs))


def conclude(config: Config, world_size: int, card: Card, reports: list[RankReport]) -> Rehearsal:
    """Say what the reports of some ranks come to."""
    tapes = [report.tape for report in reports]
    wrong = _failures(reports) or _deadlocks(disagreements(tapes))
    timeline = Timeline() if wrong else play(tapes, card)
    planned = {tape.rank: _planned(config, world_size, tape.rank) for tape in tapes}
    wrong += [*timeline.stuck, *_waits(reports), *_too_full(reports, card)]
    return Rehearsal(config, world_size, card, reports, planned, timeline, wrong)


def _check_rehearsed(config: Config) -> None:
    """Refuse FP8 whose calls between GPUs are Transformer Engine's own."""
    precision, tensor = config.precision, config.parallel.tensor
    own_calls = {
        f"precision.fp8={precision.fp8}": precision.fp8 in ("delayed", "blockwise"),
        "precision.fp8_primary_weights=true": precision.fp8_primary_weights,
        f"precision.fp8={precision.fp8} with parallel.tensor={tensor}": precision.fp8 != "none" and tensor > 1,
    }
    for given, holds in own_calls.items():
        if holds:
            raise UserError(
                f"{given} is not rehearsed, as ranks exchange FP8 by calls of Transformer Engine's: rehearse "
                "precision.fp8=tensorwise with parallel.tensor=1, or precision.fp8=none, and plan with it (w2s plan)"
            )


def _refusal(config: Config, world_size: int, card: Card) -> str:
    """The line with which the run would end before it builds anything."""
    local = min(world_size, GPUS_PER_NODE)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: local))
        stack.enter_context(mock.patch.object(gpu, "transformer_engine_installed", lambda: True))
        stack.enter_context(
            mock.patch.object(gpu, "card", lambda: gpu.Card(card.name, (9, 0) if card.fp8_tflops else (8, 0)))
        )
        try:
            check(config, world_size, local)
        except W2SError as error:
            return str(error)
    return ""


def _missing(config: Config, world_size: int) -> str:
    """The line with which the run would end for want of data; what w2s builds itself is not missing."""
    if config.data.builtin != "none":
        return ""
    try:
        find_sources(config.data, config.train.global_batch, world_size, captions=config.stage == "clip")
        for key, shards in config.eval.by_key.items():
            list_shards(shards, key, allow_pipe=config.data.allow_pipe)
    except W2SError as error:
        return f"{error} (where the shards are not on this machine, rehearse with --no-data)"
    return ""


def _without_files(config: Config) -> Config:
    """The same without what a laptop has not: weights of teachers have shapes alone, FP8 is stood in for."""

    def bare(teacher: T) -> T:
        return replace(teacher, source=teacher.source.partition("@")[0])

    distill = replace(config.clip.distill, source=config.clip.distill.source.partition("@")[0])
    precision = replace(config.precision, linear="local")
    if precision.fp8 != "none":
        precision = replace(precision, fp8="emulated")
    clip = replace(config.clip, distill=distill)
    teachers = replace(config.teachers, of=[bare(each) for each in config.teachers.of])
    teacher = replace(bare(config.teacher), compile=False)
    return replace(config, teacher=teacher, teachers=teachers, clip=clip, precision=precision)


def _failures(reports: Sequence[RankReport]) -> list[str]:
    """What ranks fail of; the same on several ranks is said once."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for report in reports:
        if report.failure:
            how = "cannot be rehearsed beyond" if report.needs_numbers else "would fail at"
            ranks.setdefault((how, report.where, report.failure), []).append(report.tape.rank)
    return [f"{_named(who)} {how} {where}: {failure}" for (how, where, failure), who in ranks.items()]


def _deadlocks(disagreements: Sequence[Disagreement]) -> list[str]:
    """Which ranks would wait for each other; of pairs that differ in the same one is named."""
    pairs: dict[tuple[str, frozenset[str]], list[Disagreement]] = {}
    for each in disagreements:
        pairs.setdefault(each.gist, []).append(each)
    return [
        f"{first}, and so would {len(others)} more pair{'s' * (len(others) > 1)} of ranks" if others else str(first)
        for first, *others in pairs.values()
    ]


def _waits(reports: Sequence[RankReport]) -> list[str]:
    """Where the host waits for the GPU within a step."""
    ranks: dict[HostWait, list[int]] = {}
    for report in reports:
        for wait in dict.fromkeys(event for event in report.tape.last_step if isinstance(event, HostWait)):
            ranks.setdefault(wait, []).append(report.tape.rank)
    return [
        f"{_named(who)} would wait for the GPU in every step: {wait.what} at {wait.where}"
        for wait, who in ranks.items()
    ]


def _too_full(reports: Sequence[RankReport], card: Card) -> list[str]:
    return [
        f"rank {report.tape.rank} would run out of memory: {report.peak / 2**30:.1f} GiB of "
        f"{card.usable_bytes / 2**30:.1f} at {report.fullest}"
        for report in reports
        if report.peak > card.usable_bytes
    ]


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _planned(config: Config, world_size: int, rank: int) -> Memory:
    stage = PlannedStage.of(config, world_size, planned_teachers(config))
    pipeline_rank = stage_of(rank, config.parallel, world_size)
    data_rank = rank // config.parallel.tensor % stage.data_size
    return rank_memory(stage, stage.states(pipeline_rank, data_rank), pipeline_rank)
