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


def gather(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the [n, ...] of all ranks, in order: [size * n, ...]."""
    if size(group) == 1:
        return own
    everyone = own.new_empty(size(group) * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own.contiguous(), group=group)
    return everyone


def scatter_sum(everyone: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add the [size * n, ...] of all ranks up and return this rank's part: [n, ...]."""
    if size(group) == 1:
        return everyone
    own = everyone.new_empty(len(everyone) // size(group), *everyone.shape[1:])
    dist.reduce_scatter_tensor(own, everyone, group=group)
    return own


def logsumexp(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the log of the sum over the ranks of the exponentials of `own`, elementwise."""
    if size(group) == 1:
        return own
    highest = own.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    total = (own - highest).exp_()
    dist.all_reduce(total, group=group)
    return highest + total.log_()
