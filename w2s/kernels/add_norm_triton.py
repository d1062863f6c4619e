"""residual + RMSNorm(branch + bias) as one Triton kernel forward and one backward.

A program holds a whole row, so every tensor is read once. With x = branch + bias, r = 1 / sqrt(mean(x^2) + eps),
n = x r and g the gradient with respect to the output, the gradient with respect to x is r (w g - n mean(w g n)), that
with respect to the weight the sum over rows of g n, that with respect to the bias the sum of the gradient with respect
to x. A backward program adds these sums up over ROWS rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 32
"""Rows of a backward program: enough programs for a GPU at 4,000 rows, and few partial sums beside the gradients."""


@triton.jit
def _forward(branch, bias, residual, weight, out, inverse, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    here = row * width + columns
    x = tl.load(branch + here, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(residual + here, mask=inside, other=0.0).to(tl.float32) + x * r * w
    tl.store(out + here, y.to(out.dtype.element_ty), mask=inside)
    tl.store(inverse + row, r)


@triton.jit
def _backward(
    grad_out,
    branch,
    bias,
    weight,
    inverse,
    grad_branch,
    grad_weight,
    grad_bias,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * ROWS, tl.minimum(program * ROWS + ROWS, rows)):
        here = row * width + columns
        g = tl.load(grad_out + here, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(branch + here, mask=inside, other=0.0).to(tl.float32) + b
        r = tl.load(inverse + row)
        n = x * r
        gradient = r * (w * g - n * (tl.sum(w * g * n, axis=0) / width))
        tl.store(grad_branch + here, gradient.to(grad_branch.dtype.element_ty), mask=inside)
        weight_sum += g * n
        bias_sum += gradient
    tl.store(grad_weight + program * width + columns, weight_sum, mask=inside)
    tl.store(grad_bias + program * width + columns, bias_sum, mask=inside)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, branch: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        branch, residual = branch.contiguous(), residual.contiguous()
        width = weight.numel()
        rows = branch.numel() // width
        out, inverse = torch.empty_like(residual), branch.new_empty(rows, dtype=torch.float32)
        _forward[(rows,)](branch, bias, residual, weight, out, inverse, width, eps, **_launch(width))
        ctx.save_for_backward(branch, bias, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        branch, bias, weight, inverse = ctx.saved_tensors
        grad_out, width, rows = outputs[0].contiguous(), weight.numel(), inverse.numel()
        programs = triton.cdiv(rows, ROWS)
        grad_branch = torch.empty_like(branch)
        grad_weight, grad_bias = inverse.new_empty(2, programs, width)
        _backward[(programs,)](
            grad_out,
            branch,
            bias,
            weight,
            inverse,
            grad_branch,
            grad_weight,
            grad_bias,
            rows,
            width,
            ROWS=ROWS,
            **_launch(width),
        )
        return grad_branch, grad_bias.sum(0).to(bias.dtype), grad_out, grad_weight.sum(0).to(weight.dtype), None


def _launch(width: int) -> dict[str, int]:
    """Return the block that holds a row, and the warps that keep it in their registers."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def fused_add_rms_norm(branch: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return residual + RMSNorm(branch + bias); shapes as in `w2s.kernels.add_norm`."""
    out: Tensor = _AddRMSNorm.apply(branch, bias, residual, weight, eps)
    return out
