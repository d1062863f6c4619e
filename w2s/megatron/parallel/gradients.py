"""The norm of gradients that lie in slices on many ranks, and what follows from it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from w2s.optim.guard import StepGuard


def global_norm(
    local_gradients: Sequence[Tensor], group: ProcessGroup, device: torch.device, loss: Tensor | None = None
) -> Tensor:
    """Return the norm of the gradients of all ranks, a float32 scalar, without waiting for the device.

    Args:
        local_gradients: the gradients that this rank answers for, none of which is another rank's too; perhaps none.
        group: the ranks that hold gradients.
        device: where the gradients live.
        loss: a scalar; where it is not a number, neither is the norm. None on ranks that do not have it.
    """
    squares = get_total_norm(local_gradients).square() if local_gradients else torch.zeros((), device=device)
    if loss is not None:
        squares = squares + 0 * loss.detach().to(device, non_blocking=True)
    if group.size() > 1:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


def clip_or_skip(
    base_optimizer: Any,
    trainable: Sequence[Tensor],
    guard: StepGuard,
    limit: float,
    group: ProcessGroup,
    loss: Tensor | None,
) -> Tensor:
    """Let the guard judge a step and scale the gradients so that their global norm is at most `limit`.

    Args:
        base_optimizer: the optimizer, which skips the steps that the guard skips.
        trainable: the gradients that this rank answers for, of what is not frozen.
        guard: judges the norm.
        limit: may be infinite.
        group: the ranks that hold gradients.
        loss: the step's, where this rank has it.

    Returns:
        The norm before clipping, a scalar, without waiting for the device.
    """
    norm = global_norm(trainable, group, guard.device, loss)
    base_optimizer.found_inf = (~guard.check(norm)).float()
    if limit < math.inf:
        clip_grads_with_norm_([p for each in base_optimizer.param_groups for p in each["params"]], limit, norm)
    return norm
