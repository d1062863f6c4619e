"""What a loss exchanges with the other ranks of a process group; None is a group of one process."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def rank(group: ProcessGroup | None) -> int:
    """Return this process's place in the group."""
    return dist.get_rank(group) if group is not None else 0


def size(group: ProcessGroup | None) -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size(group) if group is not None else 1


def all_gather(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the [n, ...] of all ranks, in order: [size * n, ...]."""
    if size(group) == 1:
        return local
    gathered = local.new_empty(size(group) * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered


def reduce_scatter(gathered: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add the [size * n, ...] of all ranks up and return this rank's part: [n, ...]."""
    if size(group) == 1:
        return gathered
    local = gathered.new_empty(len(gathered) // size(group), *gathered.shape[1:])
    dist.reduce_scatter_tensor(local, gathered, group=group)
    return local


def logsumexp(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the log of the sum over the ranks of the exponentials of `local`, elementwise."""
    if size(group) == 1:
        return local
    highest = local.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    total = (local - highest).exp_()
    dist.all_reduce(total, group=group)
    return highest + total.log_()
