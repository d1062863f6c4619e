"""The activations of an MLP: GELU(hidden + bias), exact or by tanh (both Hendrycks and Gimpel 2016), or QuickGELU.

QuickGELU(x) = x sigmoid(1.702 x) is what OpenAI's CLIPs were trained with, the GELU by tanh SigLIPs.

Each returns its output and how to compute that again from what it keeps for the backward pass: one tensor
as large as the output.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from w2s.kernels.add_norm import add_bias

QUICK = 1.702
"""Slope of QuickGELU's sigmoid."""

Recompute = Callable[[], Tensor]
"""Computes an output again, without gradients."""

Activation = Callable[[Tensor, Tensor | None], tuple[Tensor, Recompute]]
"""Takes what a linear gave without its bias [..., width], and the bias [width]; None where the linear has added it."""


def bias_gelu(hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Recompute]:
    """Return GELU(hidden + bias); one kernel a pass on a GPU.

    Args:
        hidden: [..., width], what the linear gave, without its bias.
        bias: [width]; None where the linear has added it.
    """
    if hidden.is_cuda and bias is not None:
        from w2s.kernels.gelu_triton import fused_bias_gelu  # Triton comes with torch's GPU builds only

        return fused_bias_gelu(hidden, bias), lambda: fused_bias_gelu(hidden.detach(), bias.detach())
    return _of_sum(F.gelu, add_bias(hidden, bias))


def bias_gelu_tanh(hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Recompute]:
    """Return GELU(hidden + bias) by tanh, out of PyTorch's operators everywhere; shapes as in `bias_gelu`."""
    return _of_sum(lambda x: F.gelu(x, approximate="tanh"), add_bias(hidden, bias))


def bias_quick_gelu(hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Recompute]:
    """Return QuickGELU(hidden + bias), out of PyTorch's operators everywhere; shapes as in `bias_gelu`."""
    # By SiLU, x sigmoid(x), for which PyTorch has kernels.
    return _of_sum(lambda x: F.silu(x) / QUICK, QUICK * add_bias(hidden, bias))


def _of_sum(activation: Callable[[Tensor], Tensor], summed: Tensor) -> tuple[Tensor, Recompute]:
    return activation(summed), lambda: activation(summed.detach())
