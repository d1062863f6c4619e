"""The activations of an MLP: GELU(hidden + bias), exact or by tanh (both Hendrycks and Gimpel 2016), or QuickGELU.

QuickGELU(x) = x sigmoid(1.702 x) is what OpenAI's CLIPs were trained with, the GELU by tanh SigLIPs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUICK = 1.702
"""Slope of QuickGELU's sigmoid."""


def bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(hidden + bias); one kernel a pass on a GPU. What is kept for the backward pass are the arguments.

    Args:
        hidden: [..., width], what the linear gave, without its bias.
        bias: [width].
    """
    if hidden.is_cuda:
        from w2s.kernels.gelu_triton import fused_bias_gelu  # Triton comes with torch's GPU builds only

        return fused_bias_gelu(hidden, bias)
    return plain_bias_gelu(hidden, bias)


def plain_bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Return the same out of PyTorch's operators."""
    out: Tensor = _BiasGelu.apply(hidden, bias, "none")
    return out


def bias_gelu_tanh(hidden: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(hidden + bias) by tanh, out of PyTorch's operators everywhere; shapes as in `bias_gelu`."""
    out: Tensor = _BiasGelu.apply(hidden, bias, "tanh")
    return out


def bias_quick_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Return QuickGELU(hidden + bias), out of PyTorch's operators everywhere; shapes as in `bias_gelu`."""
    out: Tensor = _BiasQuickGelu.apply(hidden, bias)
    return out


class _BiasGelu(torch.autograd.Function):
    """By itself PyTorch would keep the sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(hidden, bias)
        ctx.approximate = approximate
        out: Tensor = torch.ops.aten.gelu_(hidden + bias, approximate=approximate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        hidden, bias = ctx.saved_tensors
        grad_sum = hidden + bias  # whose memory the gradient takes
        torch.ops.aten.gelu_backward(outputs[0], grad_sum, approximate=ctx.approximate, grad_input=grad_sum)
        return grad_sum, grad_sum.flatten(0, -2).sum(0), None


class _BiasQuickGelu(torch.autograd.Function):
    """By SiLU, x sigmoid(x), for which PyTorch has kernels; by itself it would keep their inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, bias)
        return F.silu(QUICK * (hidden + bias)) / QUICK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        hidden, bias = ctx.saved_tensors
        grad_sum = torch.ops.aten.silu_backward(outputs[0], QUICK * (hidden + bias))
        return grad_sum, grad_sum.flatten(0, -2).sum(0)
