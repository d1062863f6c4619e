"""Megatron's pipeline schedules: what each rank computes, in which order, and how long the pipeline takes for it.

One forward and one backward pass follow each other after the warm-up (1F1B), with virtual stages interleaved (Narayanan
et al. 2021, section 2.2; megatron/core/pipeline_parallel/schedules.py).
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice
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
    costs, message = (passes.forward, passes.backward), passes.message
    now, exchanged, ends = [0.0] * pipeline.stages, [0.0] * pipeline.stages, list[float]()
    for step in _steps(pipeline, forward_only=not passes.backward):
        stage, chunk, time = step.stage, step.chunk, now[step.stage]
        if step.source is not None:
            time = max(time, ends[step.source] + step.arrives * message)
        cost = costs[step.backward][stage][chunk]
        gather = passes.gather[stage][chunk] if step.is_first and passes.gather else 0.0
        reduce = passes.reduce[stage][chunk] if step.is_last and passes.reduce else 0.0
        buckets = int(passes.buckets[stage][chunk]) if passes.buckets else 1
        # Bucket by bucket, weights are waited for and gradients given away.
        for _ in range(buckets):
            if gather:
                exchanged[stage] += gather / buckets
                time = max(time, exchanged[stage])
            time += cost / buckets
            if reduce:
                exchanged[stage] = max(exchanged[stage], time) + reduce / buckets
        ends.append(time)
        now[stage] = time + step.sends * message
    return max(*now, *exchanged)


class _Step(NamedTuple):
    """A turn of a rank, among those of all."""

    stage: int
    chunk: int
    backward: bool
    source: int | None
    """Number of the step that gives its input."""
    arrives: bool
    """Whether that is a message."""
    sends: bool
    """Whether the rank waits until its own message has gone."""
    is_first: bool
    """Of its chunk."""
    is_last: bool
    """Of its chunk: all its gradients are there."""


@lru_cache(maxsize=64)
def _steps(pipeline: Pipeline, forward_only: bool) -> tuple[_Step, ...]:
    """Return the turns of all ranks, each after the one that gives its input; what they cost does not matter."""
    orders = [order(pipeline, stage, forward_only) for stage in range(pipeline.stages)]
    places, numbers, steps = [0] * pipeline.stages, dict[tuple[bool, int, int], int](), list[_Step]()
    while len(steps) < sum(map(len, orders)):
        for stage, turns in enumerate(orders):
            for turn in islice(turns, places[stage], None):
                virtual = turn.chunk * pipeline.stages + stage
                giver = _giver(pipeline, turn, virtual)
                if giver is not None and giver not in numbers:
                    break
                numbers[turn.backward, turn.micro_batch, virtual] = len(steps)
                source = None if giver is None else numbers[giver]
                steps.append(_step(pipeline, turn, stage, source))
                places[stage] += 1
    return tuple(steps)


def _giver(pipeline: Pipeline, turn: Turn, virtual: int) -> tuple[bool, int, int] | None:
    """Direction, micro-batch and virtual stage of the turn that gives another one its input; None where data do."""
    last = pipeline.stages * pipeline.chunks - 1
    if turn.backward and virtual == last:
        return False, turn.micro_batch, last
    source = virtual + (1 if turn.backward else -1)
    return None if source < 0 else (turn.backward, turn.micro_batch, source)


def _step(pipeline: Pipeline, turn: Turn, stage: int, source: int | None) -> _Step:
    is_loss = turn.backward and stage == pipeline.stages - 1 and turn.chunk == pipeline.chunks - 1
    is_end = stage == (0 if turn.backward else pipeline.stages - 1)
    return _Step(
        stage,
        turn.chunk,
        turn.backward,
        source,
        arrives=pipeline.stages > 1 and not is_loss,
        sends=pipeline.chunks == 1 and not is_end,
        is_first=not turn.backward and turn.micro_batch == 0,
        is_last=turn.backward and turn.micro_batch == pipeline.micro_batches - 1,
    )
