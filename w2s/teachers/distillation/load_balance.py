"""The images of a model-parallel group, spread over its ranks by what the teachers that see them cost."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


def balance(costs: Sequence[float], counts: Sequence[int], ranks: int) -> list[list[int]]:
    """Share out images so that the rank with most work has little more than the mean.

    Image by image, those of the most expensive teacher first, to the rank that has least so far (Graham 1969, "Bounds
    on multiprocessing timing anomalies"): no rank has more than the mean and one image.

    Args:
        costs: of an image, by teacher.
        counts: images by teacher.
        ranks: how many share.

    Returns:
        The images of each teacher on each rank: [ranks][teachers].
    """
    shares = [[0] * len(costs) for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for teacher in sorted(range(len(costs)), key=lambda teacher: -costs[teacher]):
        for _ in range(counts[teacher]):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + costs[teacher], rank))
            shares[rank][teacher] += 1
    return shares


class AllSamples:
    """All samples that this rank has, which it shows to a teacher itself: nothing is exchanged."""

    def pick(self, local: Tensor) -> Tensor:
        """All of them."""
        return local

    def join(self, local: Tensor) -> Tensor:
        """All of them."""
        return local


@dataclass(frozen=True)
class BalancedSamples:
    """The samples of a model-parallel group that have a teacher, and who of its ranks shows them to it."""

    of_ranks: Sequence[NDArray[np.int64]]
    """Indices of samples in the group's batch, by rank."""
    size: int
    """Samples of the group."""
    group: dist.ProcessGroup

    @property
    def samples(self) -> NDArray[np.int64]:
        """Those that this rank shows to it."""
        return self.of_ranks[dist.get_rank(self.group)]

    def pick(self, whole: Tensor) -> Tensor:
        """Pick from [size, ...] the samples of this rank."""
        return whole[_on(whole.device, self.samples)]

    def join(self, local: Tensor) -> Tensor:
        """Put what all ranks have of their samples in its place: [size, ...], zeros for those without the teacher."""
        ranks, most = len(self.of_ranks), max(map(len, self.of_ranks))
        gathered = local
        if ranks > 1:
            padded = torch.cat([local, local.new_zeros(most - len(local), *local.shape[1:])])
            gathered = local.new_empty(ranks * most, *local.shape[1:])
            dist.all_gather_into_tensor(gathered, padded, group=self.group)
            held = [rank * most + np.arange(len(samples)) for rank, samples in enumerate(self.of_ranks)]
            gathered = gathered[_on(local.device, np.concatenate(held))]
        whole = local.new_zeros(self.size, *local.shape[1:])
        return whole.index_copy_(0, _on(local.device, np.concatenate(self.of_ranks)), gathered)


def balance_samples(has: NDArray[np.bool_], costs: Sequence[float], group: dist.ProcessGroup) -> list[BalancedSamples]:
    """Return the part of each teacher; every rank of the group finds the same.

    Args:
        has: whether a sample of the group has a teacher [n, teachers].
        costs: of an image, by teacher.
        group: the model-parallel group.
    """
    counts: list[int] = np.count_nonzero(has, axis=0).tolist()
    shares = balance(costs, counts, dist.get_world_size(group))
    return [
        BalancedSamples(np.split(np.flatnonzero(column), np.cumsum(of_ranks)[:-1]), len(has), group)
        for column, of_ranks in zip(has.T, zip(*shares, strict=True), strict=True)
    ]


def _on(device: torch.device, indices: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(indices).to(device, non_blocking=True)
