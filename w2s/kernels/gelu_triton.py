"""GELU(hidden + bias) as one Triton kernel forward and one backward.

With x = hidden + bias and P the standard normal distribution function, the output is x P(x) and the gradient with
respect to x is P(x) + x P'(x) times that with respect to the output; the gradient with respect to the bias is its sum
over rows. A backward program adds that up over the ROWS rows of its tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 32, 256
"""A program's tile."""

_ROOT_HALF = tl.constexpr(0.5**0.5)
_DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * width + column, (row < rows) & (column < width), column


@triton.jit
def _forward(hidden, bias, out, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    here, inside, column = _tile(rows, width, ROWS, COLUMNS)
    x = tl.load(hidden + here, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    y = x * (0.5 + 0.5 * tl.erf(x * _ROOT_HALF))
    tl.store(out + here, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_out, hidden, bias, grad_hidden, grad_bias, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    here, inside, column = _tile(rows, width, ROWS, COLUMNS)
    x = tl.load(hidden + here, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    slope = 0.5 + 0.5 * tl.erf(x * _ROOT_HALF) + x * _DENSITY_AT_ZERO * tl.exp(-0.5 * x * x)
    gradient = tl.load(grad_out + here, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(grad_hidden + here, gradient.to(grad_hidden.dtype.element_ty), mask=inside)
    part = tl.sum(gradient, axis=0)[None, :]
    tl.store(grad_bias + tl.program_id(0) * width + column, part, mask=column < width)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        _forward[_grid(hidden)](hidden, bias, out, *_shape(hidden), **_LAUNCH)
        ctx.save_for_backward(hidden, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        hidden, bias = ctx.saved_tensors
        grid, grad_hidden = _grid(hidden), torch.empty_like(hidden)
        grad_bias = hidden.new_empty(grid[0], bias.numel(), dtype=torch.float32)
        _backward[grid](outputs[0].contiguous(), hidden, bias, grad_hidden, grad_bias, *_shape(hidden), **_LAUNCH)
        return grad_hidden, grad_bias.sum(0).to(bias.dtype)


_LAUNCH = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 8}


def _shape(hidden: Tensor) -> tuple[int, int]:
    return hidden.numel() // hidden.shape[-1], hidden.shape[-1]


def _grid(hidden: Tensor) -> tuple[int, int]:
    rows, width = _shape(hidden)
    return triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)


def fused_bias_gelu(hidden: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(hidden + bias); shapes as in `w2s.kernels.gelu`."""
    out: Tensor = _BiasGelu.apply(hidden, bias)
    return out
