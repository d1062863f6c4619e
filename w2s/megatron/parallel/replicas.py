"""Data-parallel replicas hold the same weights to the bit: a fault's changes are found and repaired if possible."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel.fully_sharded import FullySharded
from w2s.megatron.parallel.optimizer import Towers

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""Integers of as many bytes as a weight's type."""


@dataclass(frozen=True)
class Divergence:
    """A weight that not all replicas hold alike."""

    weight: str
    """Its name, the tower's first."""
    ranks: tuple[int, ...]
    """The ranks whose value differs from the majority's; all of them where no value has a majority."""
    repaired: bool
    """Whether they have taken it from one of the majority."""


def repair(towers: Towers, group: ProcessGroup) -> list[Divergence]:
    """Compare the weights of the replicas and repair what a majority of them agrees on; all ranks call, and wait.

    The distributed optimizer gathers each slice of a weight from its owner with every update: what has gone wrong there
    is the same on all replicas, and is not seen here.

    Args:
        towers: the towers, whole on this rank's pipeline stage and tensor-parallel share.
        group: the data-parallel group.
    """
    size = dist.get_world_size(group)
    weights = list(_weights(towers))
    if size == 1 or not weights:
        return []
    local = torch.stack([_digest(weight) for _, weight in weights])
    gathered = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(gathered, local, group=group)
    table = torch.stack(gathered, dim=1).tolist()
    return [
        _repair(name, weight, digests, group)
        for (name, weight), digests in zip(weights, table, strict=True)
        if len(set(digests)) > 1
    ]


def _repair(name: str, weight: Tensor, digests: list[int], group: ProcessGroup) -> Divergence:
    ranks = dist.get_process_group_ranks(group)
    most, count = Counter(digests).most_common(1)[0]
    if 2 * count <= len(digests):
        return Divergence(name, tuple(ranks), repaired=False)
    dist.broadcast(weight, src=ranks[digests.index(most)], group=group)
    diverged = tuple(rank for rank, digest in zip(ranks, digests, strict=True) if digest != most)
    return Divergence(name, diverged, repaired=True)


def _weights(towers: Towers) -> Iterator[tuple[str, Tensor]]:
    for tower_name, tower in towers.items():
        for chunk, wrapped in zip(tower.chunks, tower.wrapped, strict=True):
            if isinstance(wrapped, FullySharded):
                continue  # of a share there is one
            for name, weight in chunk.named_parameters():
                # Transformer Engine's quantized weights are not plain numbers.
                if type(weight.data) is Tensor:
                    yield f"{tower_name}.{global_name(chunk, name)}", weight.data


def _digest(weight: Tensor) -> Tensor:
    """The sum of the bits read as integers: one bit that is flipped always changes it."""
    return weight.view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64)
