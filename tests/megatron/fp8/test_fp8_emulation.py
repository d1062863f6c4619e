"""The linears of emulated FP8 beside float64, and the counts of what rounding does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from w2s.config.sections import ParallelConfig, VisionConfig
from w2s.errors import ConfigError
from w2s.megatron.fp8 import fp8_emulation
from w2s.megatron.fp8.fp8_emulation import cached_weights, column_linear, row_linear
from w2s.megatron.fp8.fp8_formats import FORWARD, GRADIENTS, block_scale, current_scale, quantize
from w2s.megatron.fp8.fp8_stats import rounding_stats
from w2s.megatron.fp8.linears import LOCAL
from w2s.megatron.model.tower import transformer_config
from w2s.towers.vision import vision_stack

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS, IN, OUT = 48, 64, 32
pytestmark = pytest.mark.usefixtures("alone")


def linear(kind: str, fp8_format: str, dtype: torch.dtype = torch.float32, out: int = OUT) -> torch.nn.Module:
    config = transformer_config(vision_stack(VisionConfig(), 1, ParallelConfig()), ParallelConfig(), dtype, LOCAL)
    build = {"column": column_linear, "row": row_linear}[kind](fp8_format)
    options = {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    made = build(
        IN, out, config=config, init_method=lambda _: None, bias=False, skip_bias_add=True, is_expert=False, **options
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.weight.copy_(torch.randn(out, IN, generator=generator) * 0.02)
    return made


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Values over several powers of two, some of which underflow, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * torch.exp(3 * torch.randn(rows, 1, generator=generator))
    values[::7, ::5] = 0
    return values


def rounding(values: Tensor, form: torch.dtype) -> Tensor:
    """Most that each value can move: half a unit in its last place, or half the smallest number below the normal ones.

    With m bits of mantissa the first is 2^-(m+1) of the value; the scale's own float32 rounding adds 2^-22.
    """
    info = torch.finfo(form)
    scale = info.max / values.abs().max()
    return values.abs() * (info.eps / 2 + 2**-22) + info.smallest_normal * info.eps / 2 / scale


def product_bound(a: Tensor, b: Tensor, form_a: torch.dtype, form_b: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Most that a @ b can be off: the factors' roundings, float32 sums of k terms, and the output's own rounding."""
    by_a, by_b = rounding(a, form_a), rounding(b, form_b)
    magnitude = (a.abs() + by_a) @ (b.abs() + by_b)
    sums = a.shape[1] * 2**-24 + torch.finfo(dtype).eps
    return by_a @ b.abs() + a.abs() @ by_b + by_a @ by_b + sums * magnitude


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("fp8_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_as_near_to_float64_as_the_formats_allow(kind: str, fp8_format: str, dtype: torch.dtype) -> None:
    layer = linear(kind, fp8_format, dtype)
    rows = matrix(ROWS, IN, seed=2).to(dtype).requires_grad_()
    gradient = matrix(ROWS, OUT, seed=3).to(dtype)
    out, _ = layer(rows.view(ROWS, 1, IN))
    out.backward(gradient.view(ROWS, 1, OUT))
    x, w, g = (tensor.detach().double() for tensor in (rows, layer.weight, gradient))
    back = GRADIENTS[fp8_format]
    for ours, a, b, forms in (
        (out.detach().view(ROWS, OUT), x, w.t(), (FORWARD, FORWARD)),
        (rows.grad, g, w, (back, FORWARD)),
        (layer.weight.grad, g.t(), x, (back, FORWARD)),
    ):
        assert ours is not None and ours.dtype == dtype
        error, exact = (ours.double() - a @ b).abs(), a @ b
        assert (error <= product_bound(a, b, *forms, dtype)).all()
        # FP8 did run: random roundings of 2^-4 and more do not cancel to below this
        assert error.norm() > 5e-3 * exact.norm()


def test_e5m2_gradients_are_rounded_harder_than_e4m3_ones() -> None:
    gradient = matrix(ROWS, OUT, seed=3)
    errors = []
    for form in (E4M3, E5M2):
        rounded = quantize(gradient, current_scale(gradient, form, None), form)
        large = gradient.abs() > gradient.abs().max() / 64
        errors.append(((rounded.data.float() * rounded.inverse / gradient - 1)[large]).abs().max().item())
    assert errors[0] <= 2**-4 + 1e-6 < errors[1] <= 2**-3 + 1e-6


def test_outside_of_training_there_is_no_fp8() -> None:
    layer = linear("column", "hybrid").eval()
    rows = matrix(ROWS, IN, seed=2)
    assert torch.equal(layer(rows.view(ROWS, 1, IN))[0].view(ROWS, OUT), rows @ layer.weight.t())


@pytest.mark.parametrize(("rows", "out", "named"), [(40, OUT, "40 tokens"), (ROWS, 24, "24 output columns")])
def test_what_a_gpu_could_not_multiply_is_refused(rows: int, out: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"its {named} must be a multiple of 16"):
        linear("column", "hybrid", out=out)(torch.randn(rows, 1, IN))


def test_a_weight_is_quantized_once_while_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear("column", "hybrid")
    rows = matrix(ROWS, IN, seed=2).view(ROWS, 1, IN)
    shapes: list[tuple[int, ...]] = []
    real = fp8_emulation.quantize

    def counted(tensor: torch.Tensor, *others: Any) -> Any:
        shapes.append(tuple(tensor.shape))
        return real(tensor, *others)

    monkeypatch.setattr(fp8_emulation, "quantize", counted)
    with cached_weights([layer]):
        before = layer(rows)[0]
        layer(rows)
    assert shapes == [(ROWS, IN), (OUT, IN), (ROWS, IN)]
    with torch.no_grad():
        layer.weight.neg_()
    # the next pass sees the new weight, and so does a product outside of any pass
    assert torch.equal(layer(rows)[0], -before)
    with cached_weights([layer]):
        assert torch.equal(layer(rows)[0], -before)


def test_tensors_without_a_magnitude_keep_a_finite_scale() -> None:
    for tensor in (torch.zeros(4, 4), torch.full((4, 4), 1e-44)):
        rounded = quantize(tensor, current_scale(tensor, E4M3, None), E4M3)
        assert torch.isfinite(rounded.data.float() * rounded.inverse).all()
    nothing = quantize(torch.tensor([math.nan, 1.0]), current_scale(torch.tensor([math.nan, 1.0]), E4M3, None), E4M3)
    assert nothing.data.float().isnan()[0]  # what is not a number stays none, and the loss tells


@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("factor", [1.0, 300.0])
def test_the_counts_are_those_of_a_cast(form: torch.dtype, factor: float) -> None:
    values = matrix(64, 64, seed=4)
    scale = factor * current_scale(values, form, None)
    largest, total, beyond, nonzero, lost = rounding_stats(values, scale, form, copies=1).tolist()
    exact = values.double() * scale.double()
    rounded = (values * scale).clamp(-torch.finfo(form).max, torch.finfo(form).max).to(form).float()
    assert largest == values.abs().max().item() and total == 64 * 64
    assert nonzero == (values != 0).sum().item()
    assert lost == ((rounded == 0) & (values != 0)).sum().item()
    # beyond: what is nearer to the number that would come after the largest one than to the largest
    after = torch.finfo(form).max * (1 + torch.finfo(form).eps / 1.75)
    assert beyond == (exact.abs() > (torch.finfo(form).max + after) / 2).sum().item()
    assert (beyond > 0) == (factor > 1)
    assert rounding_stats(values, scale, form, copies=4)[1:].tolist() == [n / 4 for n in (total, beyond, nonzero, lost)]


def test_block_scales_are_powers_of_two_below_the_scales_of_the_blocks() -> None:
    values = matrix(40, 70, seed=5)
    scales = block_scale(values, E4M3, rows=16, columns=32)
    assert scales.shape == values.shape
    for top in range(0, 40, 16):
        for left in range(0, 70, 32):
            block = (slice(top, top + 16), slice(left, left + 32))
            exact = current_scale(values[block], E4M3, None)
            power = scales[block].unique()
            assert len(power) == 1 and power <= exact < 2 * power and power.log2() % 1 == 0
