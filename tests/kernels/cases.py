"""What the fused operators are tried on; run as a command, it tries the Triton kernels in Triton's interpreter."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from w2s.kernels.add_norm import plain_add_rms_norm
from w2s.kernels.gelu import bias_gelu

ROWS, WIDTH, EPS = 70, 600, 1e-6
"""Nothing here is a whole number of tiles."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Operator = Callable[..., Tensor]

PLAIN: dict[str, Operator] = {
    "add_norm": partial(plain_add_rms_norm, eps=EPS),
    "gelu": lambda hidden, bias: bias_gelu(hidden, bias)[0],
}
DEFINITION: dict[str, Operator] = {
    "add_norm": lambda branch, bias, residual, weight: (
        residual + weight * (x := branch + bias) * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    ),
    "gelu": lambda hidden, bias: F.gelu(hidden + bias),
}


def fused(name: str) -> Operator:
    """The Triton kernels; importing them needs Triton."""
    module = import_module(f"w2s.kernels.{name}_triton")
    return {"add_norm": lambda *x: module.fused_add_rms_norm(*x, EPS), "gelu": lambda *x: module.fused_bias_gelu(*x)}[
        name
    ]


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Arguments of an operator, and last the gradient with respect to its output."""
    generator = torch.Generator().manual_seed(0)
    rows, vector = (ROWS, 1, WIDTH), (WIDTH,)
    shapes = {"add_norm": [rows, vector, rows, vector, rows], "gelu": [rows, vector, rows]}[name]
    return [(1.5 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def results(operator: Operator, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients by all arguments."""
    *arguments, gradient = (tensor.detach().clone() for tensor in tensors)
    output = operator(*(argument.requires_grad_() for argument in arguments))
    output.backward(gradient)
    return [output.detach(), *(argument.grad for argument in arguments if argument.grad is not None)]


if __name__ == "__main__":
    tried = {
        (name, kind): results(fused(name), inputs(name, dtype)) for name in PLAIN for kind, dtype in DTYPES.items()
    }
    torch.save(tried, Path(sys.argv[1]))
