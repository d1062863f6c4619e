"""The two formats of FP8, and how a tensor is scaled into one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

FORWARD = torch.float8_e4m3fn
"""Format of inputs and weights."""
GRADIENTS = {"hybrid": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}
"""Format of gradients, by `precision.fp8_format`."""

Record = Callable[[str, Tensor, Tensor, torch.dtype, int], None]
"""Takes a matrix's kind (`input`, `weight`, `gradient`), what `sampled` leaves of it, its scale, its format, and how
many ranks hold the same."""


@dataclass(frozen=True)
class Fp8Tensor:
    """A matrix in FP8: its values are `data * inverse`."""

    data: Tensor
    """FP8 numbers."""
    inverse: Tensor
    """float32 scalar: the inverse of the scale."""

    def t(self) -> "Fp8Tensor":
        """Return the transposed matrix."""
        return Fp8Tensor(self.data.t(), self.inverse)


def sampled(matrix: Tensor) -> Tensor:
    """Return every 16th block of 128 rows of a large matrix, a small one whole: enough to tell what rounding does.

    Args:
        matrix: [m, n].
    """
    if len(matrix) <= 2048:
        return matrix
    return matrix[: len(matrix) // 128 * 128].unflatten(0, (-1, 128))[::16].flatten(0, 1)


def current_scale(tensor: Tensor, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Tensor:
    """Return the largest number of a format divided by the largest magnitude of a tensor: float32 scalar.

    Args:
        tensor: any shape; zeros have scale 1.
        dtype: the format.
        group: ranks that hold the other parts of the tensor; None where this rank holds it whole.
    """
    largest = tensor.detach().abs().amax().float()
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return _scale(largest, dtype)


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.finfo(dtype).max / largest
    return torch.where(largest > 0, scale.clamp(max=torch.finfo(torch.float32).max), torch.ones_like(scale))


def quantize(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Fp8Tensor:
    """Round a scaled tensor to FP8; what is beyond the format's largest number becomes that."""
    most = torch.finfo(dtype).max
    return Fp8Tensor((tensor.float() * scale).clamp(-most, most).to(dtype), scale.reciprocal())


def block_scale(matrix: Tensor, dtype: torch.dtype, rows: int, columns: int = 128) -> Tensor:
    """Return the current scale of each block of a matrix, at each of its values: float32 powers of two, of its shape.

    Args:
        matrix: [m, n].
        dtype: the format.
        rows: rows of a block.
        columns: columns of a block.
    """
    height, width = matrix.shape
    padded = F.pad(matrix.detach().abs().float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    largest = blocks.amax(dim=(1, 3), keepdim=True).expand_as(blocks).flatten(2, 3).flatten(0, 1)[:height, :width]
    # frexp gives a mantissa from 0.5 to 1: half of its power of two is the largest one that is not above the scale.
    return torch.exp2(torch.frexp(_scale(largest, dtype)).exponent - 1.0)
