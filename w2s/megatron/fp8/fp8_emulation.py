"""FP8 without Transformer Engine: Megatron's linears over `torch._scaled_mm`, with current scaling.

Each factor of a product is scaled so that its largest magnitude becomes the largest number of the format, and rounded.
E4M3 holds inputs and weights, E5M2 (`hybrid`) or E4M3 gradients; sums are float32. Source: Micikevicius et al., "FP8
Formats for Deep Learning", 2022; Transformer Engine's recipe is Float8CurrentScaling. One difference from it: a tensor
that tensor-parallel ranks share has one scale, that of the whole, so that every layout rounds alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from w2s.compat import scaled_mm
from w2s.config.fp8_checks import ALIGNMENT
from w2s.errors import ConfigError
from w2s.megatron.compat import OwnProduct
from w2s.megatron.fp8.fp8_formats import FORWARD, GRADIENTS, Fp8Tensor, Record, current_scale, quantize, sampled


def multiply(a: Fp8Tensor, b: Fp8Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of a [m, k] and b [k, n] as `dtype` [m, n]."""
    with _own_cpu_kernel():
        # cuBLAS takes its first factor by rows and its second by columns.
        return scaled_mm(a.data.contiguous(), b.data.t().contiguous().t(), a.inverse, b.inverse, dtype)


@contextmanager
def _own_cpu_kernel() -> Iterator[None]:
    """Keep oneDNN out of it: for E4M3 times E4M3 it has nothing but a loop, 300 times slower than torch's own way."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class Product(torch.autograd.Function):
    """input @ weight.T, and both products of its backward pass, in FP8."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, weight: Tensor, linear: "_Emulated") -> Tensor:
        """Multiply, and keep both factors in FP8."""
        quantized, own_weight = linear.quantize("input", packed), linear.quantize_weight(weight)
        ctx.linear, ctx.dtypes = linear, (packed.dtype, weight.dtype)
        ctx.save_for_backward(quantized.data, quantized.inverse, own_weight.data, own_weight.inverse)
        return multiply(quantized, own_weight.t(), packed.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients with respect to the tokens and the weight, as far as they are needed."""
        saved = ctx.saved_tensors
        packed, weight = Fp8Tensor(*saved[:2]), Fp8Tensor(*saved[2:])
        quantized = ctx.linear.quantize("gradient", gradient)
        grad_packed = multiply(quantized, weight, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        grad_weight = multiply(quantized.t(), packed, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return grad_packed, grad_weight, None


class _Emulated(OwnProduct):
    """What makes a Megatron linear multiply in FP8 while it is trained; mixed into its class.

    Attributes:
        gradients: format of gradients.
        sharded_kinds: the kinds of tensors that tensor-parallel ranks hold parts of.
        caches_weight: whether the weight does not change until `cache_weight` says so.
        cached_weight: the weight in FP8, once it was needed and as long as it stays.
    """

    gradients: torch.dtype
    sharded_kinds: frozenset[str]
    tp_group: dist.ProcessGroup
    _record: Record | None = None
    _recorded: set[str]
    caches_weight = False
    cached_weight: Fp8Tensor | None = None

    def product(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, allreduce_dgrad: bool, sequence_parallel: bool
    ) -> Tensor:
        """Do what Megatron's linears do, in FP8."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        packed = input.reshape(-1, input.shape[-1])
        _require_alignment(packed, weight)
        out = Product.apply(packed, weight, self).view(*input.shape[:-1], -1)
        return out if bias is None else out + bias

    def quantize(self, kind: str, tensor: Tensor) -> Fp8Tensor:
        """Return a tensor of some kind in FP8, with the scale of the whole."""
        dtype = self.gradients if kind == "gradient" else FORWARD
        scale = current_scale(tensor, dtype, self.tp_group if kind in self.sharded_kinds else None)
        if self._record is not None and kind not in self._recorded:
            self._recorded.add(kind)
            copies = 1 if kind in self.sharded_kinds else dist.get_world_size(self.tp_group)
            self._record(kind, sampled(tensor), scale, dtype, copies)
        return quantize(tensor, scale, dtype)

    def quantize_weight(self, weight: Tensor) -> Fp8Tensor:
        """Return the weight in FP8: once for all micro-batches inside of `cached_weights`, else anew."""
        if self.cached_weight is not None:
            return self.cached_weight
        made = self.quantize("weight", weight)
        if self.caches_weight:
            self.cached_weight = made
        return made

    def record_with(self, record: Record) -> "_Emulated":
        """Tell `record` of the first tensor of each kind that is quantized, until `remove`."""
        self._record, self._recorded = record, set()
        return self

    def remove(self) -> None:
        """Tell nobody any more."""
        self._record = None

    def cache_weight(self, stays: bool) -> None:
        """Say whether the weight stays as it is from now on."""
        self.caches_weight, self.cached_weight = stays, None


def _require_alignment(packed: Tensor, weight: Tensor) -> None:
    sizes = {"tokens": len(packed), "input columns": packed.shape[1], "output columns": len(weight)}
    for name, size in sizes.items():
        if size % ALIGNMENT:
            raise ConfigError(
                f"{len(packed)} x {packed.shape[1]} by {packed.shape[1]} x {len(weight)} in FP8: its {size} {name} "
                f"must be a multiple of {ALIGNMENT}: change train.micro_batch or the model's widths, or use "
                "precision.fp8=none"
            )


@cache
def column_linear(fp8_format: str) -> type[ColumnParallelLinear]:
    """Return Megatron's column-parallel linear in FP8: ranks share weight and output."""
    attributes = {"gradients": GRADIENTS[fp8_format], "sharded_kinds": frozenset({"weight", "gradient"})}
    return type("Fp8ColumnParallelLinear", (_Emulated, ColumnParallelLinear), attributes)


@cache
def row_linear(fp8_format: str) -> type[RowParallelLinear]:
    """Return Megatron's row-parallel linear in FP8: ranks share weight and input."""
    attributes = {"gradients": GRADIENTS[fp8_format], "sharded_kinds": frozenset({"weight", "input"})}
    return type("Fp8RowParallelLinear", (_Emulated, RowParallelLinear), attributes)


def emulated_linears(module: torch.nn.Module) -> list[_Emulated]:
    """Return the linears of a module that multiply in emulated FP8."""
    return [part for part in module.modules() if isinstance(part, _Emulated)]


@contextmanager
def cached_weights(modules: list[Any]) -> Iterator[None]:
    """Inside, the weights of the modules do not change: each is quantized once."""
    linears = [linear for module in modules for linear in emulated_linears(module)]
    for linear in linears:
        linear.cache_weight(True)
    try:
        yield
    finally:
        for linear in linears:
            linear.cache_weight(False)
