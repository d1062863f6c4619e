"""RMSNorm out of PyTorch's operators, with a backward pass of few steps in float32 on a CPU.

There torch has one kernel for a layer norm, and for RMSNorm a chain of operators whose backward pass takes four times
as long. With n = x r and g the gradient by the output w n, the gradient by x is r (w g - n mean(w g n)). That of a
layer norm of mean 0 is the same less r mean(w g), which is added to it here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * rows / sqrt(mean(rows^2) + eps).

    Args:
        rows: [..., width].
        weight: [width].
        eps: added to the mean square.
    """
    if rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32:
        out: Tensor = _RmsNormOnCpu.apply(rows, weight, eps)
        return out
    return F.rms_norm(rows, weight.shape, weight, eps)


class _RmsNormOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
        inverse = squares.div_(weight.numel()).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, inverse)
        return (rows * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        rows, weight, inverse = ctx.saved_tensors
        by_out, mean = outputs[0].contiguous(), torch.zeros_like(inverse)
        by_rows, by_weight, _ = torch.ops.aten.native_layer_norm_backward(
            by_out, rows, weight.shape, mean, inverse, weight, None, [True, True, False]
        )
        by_rows.addcmul_((by_out @ weight).unsqueeze(-1), inverse, value=1 / weight.numel())
        return by_rows, by_weight, None
