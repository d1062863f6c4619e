"""The norm of gradients that lie in slices on many ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.utils import get_total_norm


def global_norm(
    own: Sequence[Tensor], group: ProcessGroup, device: torch.device, beside: Tensor | None = None
) -> Tensor:
    """Return the norm of the gradients of all ranks, a float32 scalar that nobody has waited for.

    Args:
        own: the gradients that this rank answers for, none of which is another rank's too; perhaps none.
        group: the ranks that hold gradients.
        device: where the gradients live.
        beside: a scalar (a loss) without which the norm is no number if it is none itself; None where a rank has none.
    """
    squares = get_total_norm(own).square() if own else torch.zeros((), device=device)
    if beside is not None:
        squares = squares + 0 * beside.detach().to(device, non_blocking=True)
    dist.all_reduce(squares, group=group)
    return squares.sqrt()
