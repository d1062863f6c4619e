"""Megatron's pipeline schedules: what each rank computes, in which order, and how long the pipeline takes for it.

One forward and one backward pass follow each other after the warm-up (1F1B), with virtual stages interleaved (Narayanan
et al. 2021, section 2.2; megatron/core/pipeline_parallel/schedules.py). The simulation is the one that rehearsals are
played in (`timeline.py`).
"""

from collections import deque
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any, NamedTuple

from w2s.planning.cards import Card
from w2s.planning.tape import Call, Compute, Event, Group, Tape, Wait
from w2s.planning.timeline import play


class Turn(NamedTuple):
    """A pass of a micro-batch through a chunk of a rank."""

    backward: bool
    micro_batch: int
    chunk: int


@dataclass(frozen=True)
class Pipeline:
    """A pipeline and what goes through it."""

    stages: int
    """Ranks."""
    chunks: int
    """Chunks of a rank."""
    group: int
    """Micro-batches that go through a chunk before the next one's turn."""
    micro_batches: int

    @property
    def turns(self) -> int:
        """Passes of a rank in one direction."""
        return self.micro_batches * self.chunks


@cache
def order(pipeline: Pipeline, stage: int, forward_only: bool = False) -> tuple[Turn, ...]:
    """Return what a rank of the pipeline computes, in order."""
    chunks, group, total = pipeline.chunks, pipeline.group, pipeline.micro_batches
    table = [
        (micro_batch, chunk)
        for first in range(0, total, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, total))
    ]
    forward = [Turn(False, micro_batch, chunk) for micro_batch, chunk in table]
    if forward_only:
        return tuple(forward)
    backward = [Turn(True, micro_batch, chunks - 1 - chunk) for micro_batch, chunk in table]
    ahead = pipeline.stages - stage - 1
    warm_up = min(2 * ahead + (chunks - 1) * group if chunks > 1 else ahead, pipeline.turns)
    turns = forward[:warm_up]
    for one, other in zip(forward[warm_up:], backward, strict=False):
        turns += [one, other]
    return (*turns, *backward[pipeline.turns - warm_up :])


@dataclass(frozen=True)
class Passes:
    """What passes through a pipeline cost."""

    forward: tuple[tuple[float, ...], ...]
    """Seconds of a micro-batch in each chunk of each rank."""
    backward: tuple[tuple[float, ...], ...]
    """The same of the backward pass; empty for forward passes alone."""
    message: int = 0
    """Bytes from a stage to the next."""
    distance: int = 1
    """Ranks from a stage to the next."""
    data: Group | None = None
    """The first rank's data-parallel group, where it exchanges weights and gradients beside the passes."""
    weights: tuple[tuple[int, ...], ...] = ()
    """Bytes of each chunk's weights that are gathered before its first pass."""
    gradients: tuple[tuple[int, ...], ...] = ()
    """Bytes of each chunk's gradients that are reduced after its last pass."""


def seconds(pipeline: Pipeline, passes: Passes, card: Card) -> float:
    """Return the seconds from the first rank's beginning to the last one's end.

    Of many micro-batches, in which every group takes as long as the one before, some are simulated.
    """
    group, total = pipeline.group, pipeline.micro_batches
    few = min(total, (2 * pipeline.stages // group + 3) * group + total % group)
    shorter = Pipeline(pipeline.stages, pipeline.chunks, group, few)
    taken = _simulated(shorter, passes, card)
    if few == total:
        return taken
    longer = Pipeline(pipeline.stages, pipeline.chunks, group, few + group)
    return taken + (total - few) / group * (_simulated(longer, passes, card) - taken)


def _simulated(pipeline: Pipeline, passes: Passes, card: Card) -> float:
    (taken,) = play([_Stage(pipeline, passes, stage).tape() for stage in range(pipeline.stages)], card).steps
    return taken


_FORWARD, _BACKWARD, _DATA = range(3)
"""Groups of the simulation: messages in both directions, and the data-parallel group of the first stage."""


class _Stage:
    """A rank of the pipeline, which writes down what it does."""

    def __init__(self, pipeline: Pipeline, passes: Passes, stage: int) -> None:
        self._pipeline, self._passes, self._stage = pipeline, passes, stage
        self._turns = order(pipeline, stage, forward_only=not passes.backward)
        ranks = tuple(number * passes.distance for number in range(pipeline.stages))
        groups = {way: Group("pipeline", ranks, on_gpu=True) for way in (_FORWARD, _BACKWARD)}
        if passes.data is not None:
            # Each stage has its own.
            groups[_DATA + stage] = Group("data", tuple(rank + ranks[stage] for rank in passes.data.ranks), on_gpu=True)
        self._tape, self._numbers = Tape(ranks[stage], groups, [], [0]), count()

    def tape(self) -> Tape:
        """Return what it does in a step."""
        gathered = {chunk: self._exchange("all_gather", size) for chunk, size in enumerate(self._of("weights"))}
        reduced: list[int | None] = []
        last = {turn: place for place, turn in enumerate((each.backward, each.chunk) for each in self._turns)}
        with_chunks = self._pipeline.chunks > 1
        arriving: dict[bool, deque[int | None]] = {way: deque() for way in (False, True)}
        sent: dict[bool, int | None] = {}
        coming = {way: iter([turn for turn in self._turns if turn.backward == way]) for way in (False, True)}

        def receive(way: bool, ahead: int) -> None:
            while len(arriving[way]) < ahead and (turn := next(coming[way], None)):
                arriving[way].append(self._receive(turn))

        receive(False, 1)
        for place, turn in enumerate(self._turns):
            way = turn.backward
            receive(way, 1)
            self._wait(arriving[way].popleft())
            if with_chunks:
                receive(way, self._ahead(way))
            self._wait(gathered.pop(turn.chunk, None))
            self._add(Compute("pass", self._of("backward" if way else "forward")[turn.chunk]))
            self._wait(sent.get(way))
            sent[way] = self._send(turn)
            if not with_chunks:
                following = self._turns[place + 1].backward if place + 1 < len(self._turns) else way
                receive(following, 1)
                self._wait(sent.pop(way))
            if way and last[way, turn.chunk] == place and self._passes.gradients:
                reduced.append(self._exchange("reduce_scatter", self._of("gradients")[turn.chunk]))
        for number in (*sent.values(), *reduced):
            self._wait(number)
        return self._tape

    def _ahead(self, backward: bool) -> int:
        """Messages that are expected at a time: where chunks follow each other, those of a group until its turn."""
        leading = self._pipeline.stages - 1 if backward else 0
        return self._pipeline.group - self._pipeline.stages + 1 if self._stage == leading else 1

    def _of(self, name: str) -> Any:
        figures = getattr(self._passes, name)
        return figures[self._stage] if figures else ()

    def _add(self, event: Event) -> None:
        self._tape.events.append(event)

    def _wait(self, number: int | None) -> None:
        if number is not None:
            self._add(Wait(number, "the schedule"))

    def _call(self, kind: str, group: int, size: int, peer: int = -1) -> int:
        number = next(self._numbers)
        self._add(Call(number, kind, group, (), size, "the schedule", "pass", peer=peer))
        return number

    def _exchange(self, kind: str, size: int) -> int:
        return self._call(kind, _DATA + self._stage, size)

    def _receive(self, turn: Turn) -> int | None:
        """A turn's input, from the virtual stage before, or for a backward pass from the one after."""
        return self._message("receive", turn, 1 if turn.backward else -1)

    def _send(self, turn: Turn) -> int | None:
        return self._message("send", turn, -1 if turn.backward else 1)

    def _message(self, kind: str, turn: Turn, step: int) -> int | None:
        stages, chunks = self._pipeline.stages, self._pipeline.chunks
        if not 0 <= turn.chunk * stages + self._stage + step < stages * chunks:
            return None
        peer = (self._stage + step) % stages * self._passes.distance
        return self._call(kind, _BACKWARD if turn.backward else _FORWARD, self._passes.message, peer)
