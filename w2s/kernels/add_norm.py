"""The add of a post-norm layer: residual + RMSNorm(branch + bias)."""

from torch import Tensor

from w2s.kernels.rms_norm import rms_norm


def add_bias(branch: Tensor, bias: Tensor | None) -> Tensor:
    """Return branch + bias; the branch alone where there is none left to add."""
    return branch if bias is None else branch + bias


def add_rms_norm(branch: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return residual + RMSNorm(branch + bias), with its statistics in float32; one kernel a pass on a GPU.

    Args:
        branch: [..., width], what the branch gave, without the bias of its last linear.
        bias: [width]; None where the linear has added it.
        residual: [..., width].
        weight: [width], of the norm.
        eps: added to the mean square.

    Returns:
        [..., width], of the residual's type.
    """
    if residual.is_cuda and bias is not None:
        from w2s.kernels.add_norm_triton import fused_add_rms_norm  # Triton comes with torch's GPU builds only

        return fused_add_rms_norm(branch, bias, residual, weight, eps)
    return plain_add_rms_norm(branch, bias, residual, weight, eps)


def plain_add_rms_norm(branch: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the same out of PyTorch's operators."""
    return residual + rms_norm(add_bias(branch, bias), weight, eps)
