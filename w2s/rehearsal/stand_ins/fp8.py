"""Products in FP8 as Transformer Engine takes them: what they keep, round and multiply, without numbers.

Its `tensorwise` recipe reads a tensor once for its largest magnitude, and once to write it in FP8 twice, as it is and
transposed (Hopper's FP8 products take factors in one layout only). Weights keep both copies, which are written once a
pass; inputs keep the transposed one for the backward pass (read in transformer_engine/pytorch/module/linear.py). On one
tensor-parallel rank no call between GPUs belongs to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from w2s.megatron.fp8 import fp8_emulation
from w2s.rehearsal.stand_ins.meter import Meter


@contextmanager
def stand_in_for_transformer_engine(meter: Meter) -> Iterator[None]:
    """Let linears in emulated FP8 do what those of Transformer Engine would, as `meter` sees it."""
    engine = _Engine(meter)
    with mock.patch.object(fp8_emulation.Product, "apply", engine.multiply):
        yield


class _Engine:
    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._weights: dict[Any, tuple[Tensor, Tensor]] = {}

    def multiply(self, packed: Tensor, weight: Tensor, linear: Any) -> Tensor:
        """Return packed @ weight.T."""
        if linear.cached_weight is None:
            self._round_weight(weight, linear)
        result: Tensor = _Product.apply(packed, weight, self)
        return result

    def _round_weight(self, weight: Tensor, linear: Any) -> None:
        if linear in self._weights:
            self._round(weight, self._weights[linear])
        else:
            self._weights[linear] = self.rounded(weight)
        linear.cached_weight = self._weights[linear] if linear.caches_weight else None

    def rounded(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tensor in FP8, and the same transposed."""
        copies = _bytes(tensor), _bytes(tensor.t())
        self._round(tensor, copies)
        return copies

    def _round(self, tensor: Tensor, copies: tuple[Tensor, Tensor]) -> None:
        self._meter.launched([tensor])
        self._meter.launched([tensor, *copies])

    def product(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Return left [m, k] @ right [k, n]."""
        (rows, inner), columns = left.shape, right.shape[1]
        self._meter.multiplied(rows, inner, columns)
        return left.new_empty(rows, columns, dtype=dtype)


class _Product(torch.autograd.Function):
    """packed @ weight.T, and both products of its backward pass."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, weight: Tensor, engine: _Engine) -> Tensor:
        rounded, transposed = engine.rounded(packed)
        ctx.engine, ctx.dtype = engine, packed.dtype
        ctx.save_for_backward(transposed, weight)
        return engine.product(rounded, weight.t(), packed.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        packed_transposed, weight = ctx.saved_tensors
        gradient, transposed = ctx.engine.rounded(gradients[0])
        grad_packed = ctx.engine.product(gradient, weight, ctx.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_packed, None, None
        return grad_packed, ctx.engine.product(transposed, packed_transposed.t(), weight.dtype), None


def _bytes(like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=torch.uint8, memory_format=torch.contiguous_format)
