"""RMSNorm out of PyTorch's operators, with a backward pass of few steps in float32 on a CPU.

There torch has one kernel for a layer norm, and for RMSNorm a chain of operators whose backward pass takes four times
as long. With n = x r and g the gradient with respect to the output w n, that with respect to x is
r (w g - n mean(w g n)). That of a layer norm of mean 0 is the same less r mean(w g), which is added to it here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * hidden / sqrt(mean(hidden^2) + eps).

    Args:
        hidden: [..., width].
        weight: [width].
        eps: added to the mean square.
    """
    if hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32:
        out: Tensor = _RmsNormOnCpu.apply(hidden, weight, eps)
        return out
    return F.rms_norm(hidden, weight.shape, weight, eps)


class _RmsNormOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_()
        inverse = squares.div_(weight.numel()).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return (hidden * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        hidden, weight, inverse = ctx.saved_tensors
        grad_out, mean = outputs[0].contiguous(), torch.zeros_like(inverse)
        grad_hidden, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad_out, hidden, weight.shape, mean, inverse, weight, None, [True, True, False]
        )
        grad_hidden.addcmul_((grad_out @ weight).unsqueeze(-1), inverse, value=1 / weight.numel())
        return grad_hidden, grad_weight, None
