"""The layouts of a stage that fit on a number of GPUs, the fastest first."""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from w2s.config.batching import data_parallel_size
from w2s.config.checks import check_settings
from w2s.config.rules import check_rules
from w2s.config.sections import Config
from w2s.errors import UserError
from w2s.planning.in_memory_costs import HostCopy, host_copy
from w2s.planning.layouts import Layouts
from w2s.planning.memory.planned_stage import PlannedStage
from w2s.planning.memory.rank_memory import Memory, rank_memory
from w2s.planning.memory.states import States
from w2s.planning.model.flops import StageFlops
from w2s.planning.model.teacher import PlannedTeacher, flops_with_teachers, planned_teachers
from w2s.planning.time.cards import Card
from w2s.planning.time.duration import StepModel, StepTime

MARGIN = 1.01
"""How much more than its plan says a layout may need and still fit; rehearsals have found 0.5 % (docs/plan.md)."""


@dataclass(frozen=True)
class Plan:
    """A layout with what it needs and how long it takes."""

    config: Config
    """The stage in this layout."""
    gpus: int
    memory: Memory
    """Of the rank that needs most."""
    time: StepTime
    flops: StageFlops
    host: HostCopy
    """A checkpoint in the memory of the hosts."""
    written: int
    """Bytes that a rank writes into a checkpoint."""
    teachers: Sequence[PlannedTeacher]
    peak: float
    """FLOP/s of all GPUs: the dense BF16 peak."""
    slow: float = 0.0
    """Seconds of a step on a bad cluster."""
    fast: float = 0.0
    """Seconds of a step on a good one."""

    @property
    def data_size(self) -> int:
        """Data-parallel ranks."""
        return data_parallel_size(self.config.parallel, self.gpus)

    @property
    def seconds(self) -> float:
        """A step; with the teacher, if the stage has one for a part of its steps."""
        return self.time.total

    @property
    def samples_per_second(self) -> float:
        """Over all GPUs."""
        return self.config.train.global_batch / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs as a fraction of the dense BF16 peak, in FP8 too."""
        return self.samples_per_second * self.flops.model / self.peak

    @property
    def hfu(self) -> float:
        """Hardware FLOPs as a fraction of the same."""
        return self.samples_per_second * self.flops.hardware / self.peak

    @property
    def days(self) -> float:
        """All steps of the stage."""
        with_teacher = self.config.teacher_steps / self.config.train.steps
        return self.config.train.steps * (self.seconds - (1 - with_teacher) * self.time.teacher) / 86_400

    @property
    def gpu_hours(self) -> float:
        """All steps on all GPUs."""
        return 24 * self.days * self.gpus


@dataclass(frozen=True)
class Plans:
    """All layouts."""

    fastest: list[Plan]
    """Some of those that fit, the fastest first."""
    fitting: int
    """How many fit."""
    legal: int
    """How many layouts there are, those that do not fit included."""


def find_plans(config: Config, card: Card, gpus: int, fixed: Collection[str] = (), top: int = 1) -> Plans:
    """Plan a stage.

    Args:
        config: the stage; its batch and all but the layout are taken from it.
        card: the GPUs.
        gpus: how many there are.
        fixed: keys of the layout whose values stay as they are.
        top: how many splits (tensor, pipeline, data-parallel size, `shard`) are wanted, each in its fastest layout; 0
            gives all layouts that fit.

    Raises:
        ConfigError: no layout is legal.
        UserError: none fits, or the card cannot do what is asked for.
    """
    _check_settings(config, card)
    teachers = planned_teachers(config)
    search = _Search(card, teachers, Layouts(config, gpus, fixed))
    candidates = sorted(search.run(), key=lambda candidate: candidate.model.least)
    if not search.legal:
        raise search.layouts.refused or UserError(f"there is no layout for {gpus} GPUs: use another number")
    if not candidates:
        raise UserError(
            f"no layout of {config.model.name} ({config.stage}) fits on {gpus} x {card.name}: the smallest needs "
            f"{search.least / 2**30:.1f} GiB of a card, {card.usable_bytes / 2**30:.1f} are to be had: use more GPUs "
            "(--gpus), or cards with more memory (--card)"
        )
    return Plans(_fastest(candidates, top), len(candidates), search.legal)


def _fastest(candidates: "Sequence[_Candidate]", top: int) -> list[Plan]:
    """Simulate layouts, the most promising first, until the others cannot be among the fastest."""
    best: dict[Any, tuple[float, int, _Candidate]] = {}
    for index, candidate in enumerate(candidates):
        least, split = candidate.model.least, candidate.split if top else index
        ranked = sorted(best.values())
        if 0 < top <= len(ranked) and least > ranked[top - 1][0]:
            break
        if split not in best or least < best[split][0]:
            timed = (candidate.model.time().total, index, candidate)
            best[split] = min(timed, best.get(split, timed))
    return [candidate.plan() for _, _, candidate in sorted(best.values())[: top or len(best)]]


def _check_settings(config: Config, card: Card) -> None:
    """Refuse what the planner does not model, and what no layout could run."""
    check_settings(config)
    check_rules(config, "precision")
    fp8 = config.precision.fp8
    if fp8 == "emulated":
        raise UserError("precision.fp8=emulated is a rehearsal, not to be planned: use precision.fp8=tensorwise")
    if fp8 != "none" and not card.fp8_tflops:
        raise UserError(f"precision.fp8={fp8} on {card.name}, which has no FP8: use precision.fp8=none")
    if fp8 != "none" and config.precision.linear == "local":
        raise UserError(f"precision.fp8={fp8} with precision.linear=local: use precision.linear=auto")
    if config.hardware.device == "cpu":
        raise UserError("hardware.device=cpu is not planned: leave it out, a plan is for GPUs")
    if config.parallel.cuda_graphs:
        raise UserError("parallel.cuda_graphs=true is not planned: leave it out")
    if config.precision.compute != "bf16":
        raise UserError(f"precision.compute={config.precision.compute} is not planned: use precision.compute=bf16")


@dataclass(frozen=True)
class _Candidate:
    """A layout that fits."""

    stage: PlannedStage
    states: Mapping[int, States]
    """See `_rank_states`."""
    memory: Memory
    """Of the rank that needs most."""
    card: Card

    @cached_property
    def model(self) -> StepModel:
        """What tells the step's time."""
        return self._model(self.card)

    @property
    def split(self) -> tuple[int, int, str]:
        """Its sizes (the data-parallel one is what is left), and what is shared out."""
        parallel = self.stage.config.parallel
        return parallel.tensor, parallel.pipeline, parallel.shard

    def _model(self, card: Card) -> StepModel:
        return StepModel(self.stage, card, max(self.states.values(), key=lambda states: states.gradients))

    def plan(self) -> Plan:
        """Simulate it, on a bad and a good cluster too."""
        stage, card = self.stage, self.card
        config, gpus, teachers = stage.config, stage.gpus, stage.teachers
        fullest = max(self.states.values(), key=lambda states: states.weights + states.optimizer)
        # Data-parallel ranks share out the weights too when they write.
        shares = 1 if stage.fully_sharded else stage.data_size
        return Plan(
            config=config,
            gpus=gpus,
            memory=self.memory,
            time=self.model.time(),
            flops=flops_with_teachers(config, gpus, teachers),
            host=host_copy(card, fullest, gpus),
            written=fullest.weights // shares + fullest.optimizer,
            teachers=teachers,
            peak=gpus * card.bf16_tflops * 1e12,
            slow=self._model(card.at("slow")).time().total,
            fast=self._model(card.at("fast")).time().total,
        )


class _Search:
    def __init__(self, card: Card, teachers: Sequence[PlannedTeacher], layouts: Layouts) -> None:
        self._card, self._teachers, self.layouts = card, teachers, layouts
        self.legal, self.least = 0, float("inf")

    def run(self) -> Iterator[_Candidate]:
        """Go through all layouts and give those that fit."""
        for split in self.layouts.splits():
            stage = PlannedStage.of(split, self.layouts.world_size, self._teachers)
            states = _rank_states(stage)
            for batch in self.layouts.batches(split):
                yield from self._recomputes(replace(stage, config=batch), states)

    def _recomputes(self, batch: PlannedStage, states: Mapping[int, States]) -> Iterator[_Candidate]:
        """What is recomputed: nothing, the GELU, all layers, or as few as make the rest fit."""
        fits = {}
        for config in self.layouts.recomputes(batch.config):
            self.legal += 1
            candidate = self._candidate(replace(batch, config=config), states)
            self.least = min(self.least, candidate.memory.total)
            fits[config.parallel.recompute] = self._fits(candidate)
            if self._fits(candidate):
                yield candidate
        if fits.get("full") and not fits.get("none", True):
            yield from self._partly_recomputed(batch, states)

    def _partly_recomputed(self, batch: PlannedStage, states: Mapping[int, States]) -> Iterator[_Candidate]:
        most = max(max(tower.split) for tower in batch.towers)

        def recomputing(layers: int) -> _Candidate | None:
            config = self.layouts.partly_recomputed(batch.config, layers)
            return None if config is None else self._candidate(replace(batch, config=config), states)

        def fits(layers: int) -> bool:
            candidate = recomputing(layers)
            return candidate is not None and self._fits(candidate)

        layers = bisect_left(range(1, most), True, key=fits) + 1
        candidate = recomputing(layers)
        if candidate is not None and layers < most:
            self.legal += 1
            yield candidate

    def _candidate(self, stage: PlannedStage, states: Mapping[int, States]) -> _Candidate:
        ranks = (rank_memory(stage, of_rank, rank) for rank, of_rank in states.items())
        return _Candidate(stage, states, max(ranks, key=lambda memory: memory.total), self._card)

    def _fits(self, candidate: _Candidate) -> bool:
        return MARGIN * candidate.memory.total <= self._card.usable_bytes


def _rank_states(stage: PlannedStage) -> dict[int, States]:
    """Of the first data-parallel rank, by rank of the pipeline, of those ranks that may need most memory.

    The first ones keep most micro-batches, the last has the loss.
    """
    last = stage.config.parallel.pipeline - 1
    return {rank: stage.states(rank) for rank in sorted({0, min(1, last), last})}
