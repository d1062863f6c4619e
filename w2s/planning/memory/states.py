"""Bytes of weights, gradients and optimizer states that Megatron allocates on a rank, padding included.

Megatron lays a chunk's parameters out in buffers, the last one first, each at a multiple of 64 elements; buckets end at
a multiple of 128 and of the data-parallel size, which shares every bucket out (megatron/core/distributed/
param_and_grad_buffer.py). Weights and gradients have a buffer of that length each. The optimizer keeps, for what a
rank's share of a bucket holds of parameters, two moments and, beside weights in bfloat16, a master copy, in float32;
and so is a moving average of the weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache

from w2s.config.sections import ParallelConfig, PrecisionConfig
from w2s.planning.model.towers import PlannedTower

_START, _END = 64, 128


@dataclass(frozen=True)
class States:
    """Bytes on one rank."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    average: int = 0

    def __add__(self, other: "States") -> "States":
        return States(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def tower_states(
    tower: PlannedTower,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    data_size: int,
    data_rank: int,
    pipeline_rank: int,
) -> States:
    """Bytes of a tower on a rank, which holds every `parallel.pipeline`-th of the virtual stages."""
    total = States()
    for chunk in range(parallel.virtual_pipeline):
        virtual = chunk * parallel.pipeline + pipeline_rank
        bucketed = parallel.overlap_grad_reduce and chunk == 0 and pipeline_rank == 0
        bucket = max(40_000_000, 1_000_000 * data_size) if bucketed else 0
        for sizes, wide in _buffers(tower, virtual, parallel.tensor, precision):
            total += _buffer(sizes, wide, precision.gradients == "fp32", data_size, data_rank, bucket)
    return total


def _buffers(
    tower: PlannedTower, stage: int, tensor: int, precision: PrecisionConfig
) -> Iterator[tuple[tuple[int, ...], bool]]:
    """The parameters of each buffer of a chunk, and whether they are float32."""
    wide = precision.compute == "fp32"
    yield tower.chunk(stage, tensor, with_logit_parameters=wide), wide
    if tower.logit_parameters and stage == len(tower.split) - 1 and not wide:
        yield (1,) * tower.logit_parameters, True


@cache
def _buffer(
    sizes: tuple[int, ...], wide: bool, wide_gradients: bool, data_size: int, data_rank: int, bucket: int
) -> States:
    spans, length = _lay_out(sizes, data_size, bucket)
    local = sum(_overlap(span, bucket_span, data_size, data_rank) for bucket_span, inside in spans for span in inside)
    return States(
        weights=length * (4 if wide else 2),
        gradients=length * (4 if wide or wide_gradients else 2),
        optimizer=local * (8 if wide else 12),
        average=local * 4,
    )


Span = tuple[int, int]


def _lay_out(sizes: tuple[int, ...], data_size: int, bucket: int) -> tuple[list[tuple[Span, list[Span]]], int]:
    """Buckets with their parameters, as spans of the buffer, and the buffer's length; `bucket` 0 makes one bucket."""
    buckets: list[tuple[Span, list[Span]]] = []
    inside: list[Span] = []
    begin = end = 0
    for size in reversed(sizes):
        start = round_up(end, _START)
        end = start + size
        inside.append((start, end))
        if bucket and end - begin >= bucket:
            end = round_up(end, math.lcm(data_size, _END))
            buckets.append(((begin, end), inside))
            begin, inside = end, []
    if inside:
        end = round_up(end, math.lcm(data_size, _END))
        buckets.append(((begin, end), inside))
    return buckets, end


def _overlap(span: Span, bucket: Span, data_size: int, data_rank: int) -> int:
    """Elements of a parameter that a rank's share of its bucket holds."""
    share = (bucket[1] - bucket[0]) // data_size
    begin = bucket[0] + data_rank * share
    return max(0, min(span[1], begin + share) - max(span[0], begin))


def round_up(value: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-value // multiple) * multiple
