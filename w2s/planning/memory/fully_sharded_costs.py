"""Memory and time of Megatron's FSDP (`parallel.shard=full`) on data-parallel ranks alone.

A layer's weights are gathered before it computes, in each forward and each backward pass; its gradients are reduced as
soon as they are there. Some of the weights that come next are gathered ahead, and some gradients wait for their turn
(megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py, `suggested_communication_unit_size`). What is
outside of layers is gathered once and reduced at the end of a backward pass.
"""

import math
from dataclasses import dataclass

from w2s.config.sections import PrecisionConfig
from w2s.planning.memory.states import States, round_up
from w2s.planning.model.towers import PlannedTower

_BF16, _FP32 = 2, 4
_UNIT = 1_000_000_000
"""Elements whose gradients may wait; half as many weights are gathered ahead. Two layers of it, if they are larger."""


@dataclass(frozen=True)
class Whole:
    """Bytes of what a rank has whole of a tower for a while."""

    weights: int
    """Weights of layers that compute or are gathered ahead, and of what is outside of layers, during its passes."""
    gradients: int
    """Gradients of a layer; those of what is outside of layers have no buffer before the backward pass has ended."""
    waiting: int
    """Most layers whose gradients there are at a time."""


def whole(tower: PlannedTower, precision: PrecisionConfig, data_size: int) -> Whole:
    """Return what a rank has whole of a tower."""
    weight, gradient = _widths(precision)
    layer, rest = _padded(tower, data_size, with_logit_parameters=weight == _FP32)
    unit = max(_UNIT, 2 * layer)
    together = min(tower.layers, 1 + math.ceil(unit / 2 / layer))
    # So many wait at most when those of a layer join them, while the next layer makes its own.
    waiting = min(tower.layers, unit // layer + 2)
    return Whole(weight * (together * layer + rest), gradient * layer, waiting)


def tower_states(tower: PlannedTower, precision: PrecisionConfig, data_size: int) -> States:
    """Bytes of a tower on a rank, padding included: those of the first rank, which has full shares."""
    weight, gradient = _widths(precision)
    layer, rest = _padded(tower, data_size, with_logit_parameters=weight == _FP32)
    # Beside weights in bfloat16 the logit parameters are float32.
    logit_parameters = round_up(tower.logit_parameters, data_size) // data_size if weight != _FP32 else 0
    share = (tower.layers * layer + rest) // data_size
    return States(
        weights=weight * share + _FP32 * logit_parameters,
        gradients=gradient * share + _FP32 * logit_parameters,
        optimizer=3 * _FP32 * (share + logit_parameters),
        average=_FP32 * (share + logit_parameters),
    )


def _widths(precision: PrecisionConfig) -> tuple[int, int]:
    """Bytes of a weight and of a gradient."""
    wide = precision.compute == "fp32"
    return _FP32 if wide else _BF16, _FP32 if wide or precision.gradients == "fp32" else _BF16


def _padded(tower: PlannedTower, data_size: int, with_logit_parameters: bool) -> tuple[int, int]:
    """Elements of a layer, and of all that is outside of layers, with which all ranks have whole rows."""
    layer, patches, pool = tower.layer_elements, sum(tower.first), sum(tower.pool)
    rest = sum(tower.chunk(0, 1, with_logit_parameters)) - tower.layers * layer - patches - pool
    embedding = round_up(patches, data_size * tower.patch_row) if patches else 0
    widest = data_size * max(tower.width, tower.mlp_width)
    return (
        round_up(layer, widest),
        round_up(rest, data_size * tower.outer_row) + embedding + round_up(pool, widest),
    )


def exposed(
    layers: int, micro_batches: int, forward: float, backward: float, gather: float, reduce: float, ahead: int
) -> float:
    """Return the seconds by which what ranks exchange delays the passes of a tower.

    One thing is exchanged at a time, in the order in which it is asked for: weights `ahead` layers before they compute,
    gradients when they are there.

    Times are seconds of a layer; without a backward pass (0) there are forward passes alone.
    """
    pairs = ((forward, 0.0), (backward, reduce)) if backward else ((forward, 0.0),)
    turns = [pair for _ in range(micro_batches) for pair in pairs for _ in range(layers)]
    computed, exchanged = 0.0, ahead * gather
    gathered = [(index + 1) * gather for index in range(ahead)]
    for index, (seconds, reduced) in enumerate(turns):
        if index + ahead < len(turns):
            exchanged = max(exchanged, computed) + gather
            gathered.append(exchanged)
        computed = max(computed, gathered[index]) + seconds
        if reduced:
            exchanged = max(exchanged, computed) + reduced
    return max(computed, exchanged) - sum(seconds for seconds, _ in turns)
