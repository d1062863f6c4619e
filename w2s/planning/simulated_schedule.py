"""Megatron's pipeline schedules: what each rank computes, in which order, and how long the pipeline takes for it.

One forward and one backward pass follow each other after the warm-up (1F1B), with virtual stages interleaved (Narayanan
et al. 2021, section 2.2; megatron/core/pipeline_parallel/schedules.py).
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from w2s.config.sections import ParallelConfig


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


def pipeline_of(parallel: ParallelConfig, micro_batches: int) -> Pipeline:
    """Return the pipeline of a layout."""
    group = parallel.micro_batch_group or parallel.pipeline
    return Pipeline(parallel.pipeline, parallel.virtual_pipeline, group, micro_batches)


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


Chunks = tuple[tuple[float, ...], ...]
"""A figure of each chunk of each rank."""


@dataclass(frozen=True)
class Passes:
    """What passes through a pipeline cost, in seconds."""

    forward: Chunks
    """A micro-batch's forward pass through a chunk."""
    backward: Chunks = ()
    """Its backward pass; nothing where there are forward passes alone."""
    message: float = 0.0
    """From a stage to the next. With several chunks per rank it is on its way while the rank continues; otherwise both
    wait."""
    gather: Chunks = ()
    """Gathering a chunk's weights, which begins with the first pass, in the order of the chunks; nothing for none."""
    reduce: Chunks = ()
    """Reducing a chunk's gradients, which begins with the end of its last backward pass; nothing for none."""
    buckets: Chunks = ()
    """Parts in which a chunk's weights and gradients are exchanged while it computes; nothing for one each."""


def seconds(pipeline: Pipeline, passes: Passes) -> float:
    """Return the seconds from the first rank's beginning to the last one's end.

    Of many micro-batches, of which every group takes as long as the one before, some are simulated.
    """
    group, total = pipeline.group, pipeline.micro_batches
    few = min(total, (2 * pipeline.stages // group + 3) * group + total % group)
    taken = _simulated(replace(pipeline, micro_batches=few), passes)
    if few == total:
        return taken
    longer = _simulated(replace(pipeline, micro_batches=few + group), passes)
    return taken + (total - few) / group * (longer - taken)


def _simulated(pipeline: Pipeline, passes: Passes) -> float:
    ranks = [_Rank(pipeline, passes, stage) for stage in range(pipeline.stages)]
    done: dict[tuple[bool, int, int], float] = {}
    while any([rank.go_on(done) for rank in ranks]):
        pass
    return max(rank.end for rank in ranks)


class _Rank:
    """A rank of the pipeline on its way through its turns."""

    def __init__(self, pipeline: Pipeline, passes: Passes, stage: int) -> None:
        self._stage, self._stages, self._chunks = stage, pipeline.stages, pipeline.chunks
        self._turns, self._place = order(pipeline, stage, forward_only=not passes.backward), 0
        self._costs = passes.forward[stage], passes.backward[stage] if passes.backward else ()
        self._message, self._now, self._exchanged = passes.message, 0.0, 0.0
        self._gather = dict(enumerate(passes.gather[stage])) if passes.gather else {}
        self._reduce = dict(enumerate(passes.reduce[stage])) if passes.reduce else {}
        self._buckets = passes.buckets[stage] if passes.buckets else (1,) * pipeline.chunks
        self._left = Counter(turn.chunk for turn in self._turns if turn.backward)

    @property
    def end(self) -> float:
        """When all is computed and reduced."""
        return max(self._now, self._exchanged)

    def go_on(self, done: dict[tuple[bool, int, int], float]) -> bool:
        """Take the turns whose inputs are there; say whether there were any.

        Args:
            done: when turns of all ranks ended, by direction, micro-batch and virtual stage.
        """
        begun = self._place
        while self._place < len(self._turns):
            turn = self._turns[self._place]
            virtual = turn.chunk * self._stages + self._stage
            arrived = self._arrived(turn, virtual, done)
            if arrived is None:
                break
            self._now = max(self._now, arrived)
            self._compute(turn)
            done[turn.backward, turn.micro_batch, virtual] = self._now
            if self._chunks == 1 and 0 <= virtual + (-1 if turn.backward else 1) < self._stages:
                self._now += self._message
            self._place += 1
        return self._place > begun

    def _arrived(self, turn: Turn, virtual: int, done: dict[tuple[bool, int, int], float]) -> float | None:
        """When the input of a turn is here; None where that is not known yet."""
        last = self._stages * self._chunks - 1
        if turn.backward and virtual == last:
            return done.get((False, turn.micro_batch, last))
        source = virtual + (1 if turn.backward else -1)
        if source < 0:
            return 0.0
        sent = done.get((turn.backward, turn.micro_batch, source))
        away = self._stages > 1
        return None if sent is None else sent + (self._message if away else 0.0)

    def _compute(self, turn: Turn) -> None:
        """Take a turn, whose chunk may wait for weights, bucket by bucket, or give its gradients away."""
        cost, buckets = self._costs[turn.backward][turn.chunk], int(self._buckets[turn.chunk])
        gather = self._gather.pop(turn.chunk, 0.0)
        self._left[turn.chunk] -= turn.backward
        reduce = self._reduce.get(turn.chunk, 0.0) if turn.backward and not self._left[turn.chunk] else 0.0
        for _ in range(buckets):
            if gather:
                self._exchanged += gather / buckets
                self._now = max(self._now, self._exchanged)
            self._now += cost / buckets
            if reduce:
                self._exchanged = max(self._exchanged, self._now) + reduce / buckets
