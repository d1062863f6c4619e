"""Linears that add their bias within the product, beside Megatron's own."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from tests.megatron.spawn import make_student
from w2s.megatron import compat
from w2s.megatron.fp8.whole_linears import ColumnLinear, RowLinear
from w2s.megatron.parallel.process_groups import Ranks

kinds = pytest.mark.parametrize(
    ("ours", "megatron"), [(ColumnLinear, ColumnParallelLinear), (RowLinear, RowParallelLinear)]
)


def make(kind: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """A linear of 24 to 16 channels, with the same weights whatever its kind."""
    config = make_student().chunks[0].config
    others = {"input_is_parallel": True} if issubclass(kind, RowParallelLinear) else {}
    linear = kind(24, 16, config=config, init_method=torch.nn.init.zeros_, bias=True, skip_bias_add=True, **others)
    with torch.no_grad():
        for number, parameter in enumerate(linear.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return linear.to(dtype)


def passes(linear: Any, inputs: Tensor, grad_out: Tensor) -> list[Tensor]:
    """The output with its bias, and the gradients with respect to the inputs and the bias."""
    inputs = inputs.detach().requires_grad_()
    output, bias = linear(inputs)
    output = output if bias is None else output + bias
    output.backward(grad_out)
    assert inputs.grad is not None
    return [output.detach(), inputs.grad, linear.bias.grad]


@kinds
@pytest.mark.parametrize("accumulate", ["", "first product of a step", "later one"])
def test_it_computes_what_megatrons_does(alone: Ranks, ours: Any, megatron: Any, accumulate: str) -> None:
    generator = torch.Generator().manual_seed(9)
    inputs, grad_out = (torch.randn(5, 1, width, generator=generator) for width in (24, 16))
    found = []
    for kind in (ours, megatron):
        linear = make(kind)
        if accumulate:
            later = accumulate == "later one"
            linear.weight.main_grad = torch.full_like(linear.weight, float(later))
            linear.weight.grad_added_to_main_grad = later
            compat.accumulate_in_products(linear)
        with torch.autograd.graph.saved_tensors_hooks(
            torch.Tensor.detach, lambda kept: kept
        ):  # as selective recompute has
            results = passes(linear, inputs, grad_out)
        found.append([*results, linear.weight.main_grad if accumulate else linear.weight.grad])
        assert kind is megatron or not accumulate or linear.weight.grad_added_to_main_grad
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)  # sums of up to 24 products


@kinds
def test_it_adds_the_bias_itself(alone: Ranks, ours: Any, megatron: Any) -> None:
    """In bfloat16 it is left to what follows, as on a GPU: the sum is rounded alike in every layout."""
    inputs = torch.randn(5, 1, 24)
    assert make(ours)(inputs)[1] is None
    assert make(megatron)(inputs)[1] is not None
    assert make(ours, dtype=torch.bfloat16)(inputs.bfloat16())[1] is not None


@kinds
def test_what_is_frozen_gets_no_gradient(alone: Ranks, ours: Any, megatron: Any) -> None:
    linear = make(ours).requires_grad_(False)
    inputs = torch.randn(5, 1, 24, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept) or kept, lambda kept: kept):
        linear(inputs)[0].sum().backward()
    assert inputs.grad is not None
    assert [tensor.shape for tensor in saved] == [linear.weight.shape]  # and not the inputs
    torch.testing.assert_close(inputs.grad, linear.weight.sum(0).expand(5, 1, 24))
    assert linear.weight.grad is linear.bias.grad is None
