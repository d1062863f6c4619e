"""Megatron's linears where a weight is whole, on a CPU and in float32: their bias comes within the product.

Megatron's own leave the bias to what follows, for a GPU has kernels that take it along. A CPU would go over the output
once more. In bfloat16 the bias would be added before the product is rounded, other than on a GPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Product(torch.autograd.Function):
    """input @ weight.T + bias; what DDP has of the weight's gradient is added to within the product, if asked to."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Any, bias: Tensor | None, accumulate: bool) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.parameter = weight if accumulate else None  # what is saved may come back without its attributes
        return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        grad_out = outputs[0].flatten(0, -2)
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_weight = None
        if needs_weight and ctx.parameter is not None:
            # The first product of a step finds zeros, which need not be read.
            added = ctx.parameter.grad_added_to_main_grad
            ctx.parameter.main_grad.addmm_(grad_out.t(), input.flatten(0, -2), beta=float(added))
            ctx.parameter.grad_added_to_main_grad = True
            grad_weight = torch.empty_like(weight)  # DDP's hook wants one, and drops it
        elif needs_weight:
            grad_weight = grad_out.t() @ input.flatten(0, -2)
        return outputs[0] @ weight if needs_input else None, grad_weight, grad_out.sum(0) if needs_bias else None, None


class _Whole:
    """Mixed into one of Megatron's linears."""

    weight: Tensor
    bias: Tensor | None
    gradient_accumulation_fusion: bool

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiply [tokens, 1, width], and add the bias; what is left to add comes second."""
        whole = parallel_state.get_tensor_model_parallel_world_size() == 1
        if whole and input_.device.type == "cpu" and self.weight.dtype == torch.float32:
            return _Product.apply(input_, self.weight, self.bias, self.gradient_accumulation_fusion), None
        output: tuple[Tensor, Tensor | None] = super().forward(input_)  # type: ignore[misc]
        return output


class ColumnLinear(_Whole, ColumnParallelLinear):
    """The linear whose output tensor-parallel ranks share."""


class RowLinear(_Whole, RowParallelLinear):
    """The linear whose input they share."""
