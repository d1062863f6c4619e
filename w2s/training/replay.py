"""Whose fault a bad step is: it is repeated by the same data-parallel rank and by another, each on its own.

The idea is that of Megatron's rerun (megatron/core/rerun_state_machine.py): what fails again elsewhere is the data,
what fails again here alone the device, what does not fail again a passing fault. Here the unit is a data-parallel
rank: the ranks that hold one replica of the model together, as the fault of one reaches all of them.
"""

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import torch
from torch import Tensor
from torch.distributed import get_process_group_ranks

from w2s.data.samples.batch import Batch, swap_batch
from w2s.megatron.parallel.pipeline_schedule import no_grad_sync
from w2s.megatron.parallel.process_groups import Ranks
from w2s.training.stage import Stage

_OUTLIER = 10.0
"""A norm of gradients so many times that of most data-parallel ranks stands out."""
_NAMED = 3
"""Samples of a rank that are named."""


@dataclass(frozen=True)
class Participant:
    """A rank that takes part."""

    data_rank: int
    rank: int
    host: str
    samples: list[str]
    """Some of its samples."""


@dataclass(frozen=True)
class Diagnosis:
    """What follows from a repeated step."""

    words: str
    """What follows "it is "."""
    passing: bool = False
    """Whether nothing is wrong any more: the step may be taken."""


def replay(stage: Stage, batch: Batch, ranks: Ranks) -> Diagnosis:
    """Repeat a step twice, by the data-parallel ranks that did it and each by the next one.

    Weights, optimizer and the stage's state stay as they are; the gradients are lost. Every rank calls, and waits.

    Args:
        stage: whose step it is.
        batch: this rank's share, on the host.
        ranks: this process among all.
    """
    participants = ranks.gather(Participant(ranks.data_rank, ranks.rank, socket.gethostname(), batch.keys[:_NAMED]))
    replicas = get_process_group_ranks(ranks.data_group)
    same = _norms(stage, batch, ranks)
    if ranks.data_size == 1:
        return diagnose(same, None, participants)
    following, before = (replicas[(ranks.data_rank + by) % ranks.data_size] for by in (1, -1))
    others = swap_batch(batch, ranks.control_group, to=following, source=before)
    return diagnose(same, _norms(stage, others, ranks), participants)


def diagnose(same: Sequence[float], swapped: Sequence[float] | None, participants: Sequence[Participant]) -> Diagnosis:
    """Judge a repeated step.

    Args:
        same: norm of the gradients that each data-parallel rank has with its own samples; NaN where it has none.
        swapped: the same with the samples of the rank before it, the last one's on the first; None with one rank.
        participants: all ranks.
    """
    bad = _standing_out(same)
    if not bad:
        words = "not reproducible (no rank fails again or stands out): a passing fault, or a spike of all ranks"
        return Diagnosis(words, passing=True)
    if swapped is None:
        return Diagnosis(
            "reproducible, and there is no other data-parallel rank to tell data, weights and device apart"
        )
    elsewhere = _standing_out(swapped)
    if len(bad) == len(elsewhere) == len(same):
        return Diagnosis("a fault of the weights: every rank fails with every sample")
    return Diagnosis("; ".join(_of_rank(each, bad, elsewhere, participants) for each in bad))


def _of_rank(data_rank: int, bad: Sequence[int], elsewhere: Sequence[int], participants: Sequence[Participant]) -> str:
    replica = [each for each in participants if each.data_rank == data_rank]
    samples = ", ".join([name for each in replica for name in each.samples][:_NAMED])
    ranks, hosts = [each.rank for each in replica], ", ".join(dict.fromkeys(each.host for each in replica))
    who = f"ranks {ranks} on {hosts}" if len(ranks) > 1 else f"rank {ranks[0]} on {hosts}"
    following = (data_rank + 1) % (1 + max(each.data_rank for each in participants))
    moves, stays = following in elsewhere, data_rank in elsewhere
    if stays and not moves:
        return f"a fault of the device of {who}: it fails with other samples too, and another rank does not with these"
    if moves and not stays:
        return f"a fault of the data of {who}, as another rank fails with them: {samples} and those beside them"
    return f"not reproducible on {who}: it fails again, but neither with other samples nor do these elsewhere"


def _standing_out(norms: Sequence[float]) -> list[int]:
    """The data-parallel ranks whose norm is not a number, or far above that of most."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    most = _OUTLIER * median_low(finite) if len(finite) > 1 else math.inf
    return [data_rank for data_rank, norm in enumerate(norms) if not norm <= most]


def clones(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _norms(stage: Stage, batch: Batch, ranks: Ranks) -> list[float]:
    """Norm of the gradients of each data-parallel rank, with losses that go over its own samples alone."""
    extra = clones(stage.extra_state())
    stage.optimizer.zero_grad()
    stage.ranks = replace(ranks, data_group=ranks.self_group, world_group=ranks.model_group)
    try:
        with no_grad_sync(stage.towers.values()):
            loss = stage.step(batch).get("loss", torch.zeros(()))
    finally:
        stage.ranks = ranks
    stage.load_extra_state(extra)
    square = stage.optimizer.local_norm().square() + 0 * loss.to(ranks.device)
    squares = [0.0] * ranks.data_size
    for data_rank, local_square in ranks.gather((ranks.data_rank, square.item())):
        squares[data_rank] += local_square
    return [math.sqrt(each) if math.isfinite(each) else math.nan for each in squares]
