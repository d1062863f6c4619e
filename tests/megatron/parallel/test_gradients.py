"""The gradient norm and clipping on the device against Megatron's own, which reads the norm back."""

import math

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from tests.distributed import run_ranks
from w2s.config.load import load
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import data_parallel
from w2s.towers.build import build_clip

LAYOUTS = {
    "data": [],
    "tensor": ["parallel.tensor=2"],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "bfloat16": ["parallel.tensor=2", "precision.compute=bf16"],
    "fixed scale": ["parallel.pipeline=2", "clip.learn_logit_scale=false"],
}
SMALL = ["model=tiny", "model.text.vocab_size=64"]
LIMITS = (0.5, 1e6)
"""Far below the norm and far above it."""


def build(config: Config, ranks: Ranks) -> Optimizer:
    """The optimizer of both towers, with gradients of one everywhere."""
    dtype = compute_dtype(config.precision)
    vision, text = (
        data_parallel(t, config.parallel, config.precision) for t in build_clip(config, dtype, ranks.device)
    )
    optimizer = Optimizer({"vision": vision, "text": text}, config.optim, dtype)
    for buffer in buffers(optimizer):
        buffer.fill_(1.0)
    return optimizer


def buffers(optimizer: Optimizer) -> list[Tensor]:
    return [buffer.grad_data for chunk in optimizer.wrapped for buffer in chunk.buffers]


def clipped(optimizer: Optimizer, kind: type[DistributedOptimizer], limit: float) -> tuple[float, list[Tensor]]:
    """The norm and the gradients as `kind` clips them; the optimizer's own stay as they are."""
    weights = optimizer.sharded.get_parameters()
    before = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = weight.grad.clone()
    norm = float(kind.clip_grad_norm(optimizer.sharded, limit))
    after = [weight.grad for weight in weights]
    for weight, gradient in zip(weights, before, strict=True):
        weight.grad = gradient
    return norm, after


def compare(configs: list[Config]) -> list[float]:
    """How many gradients each layout counts; ours and Megatron's agree on norm and gradients."""
    return [counted(config) for config in configs]


def counted(config: Config) -> float:
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        optimizer = build(config, ranks)
        optimizer.sharded.prepare_grads()
        count = clipped(optimizer, type(optimizer.sharded), 1.0)[0] ** 2
        generator = torch.Generator().manual_seed(ranks.rank)
        for buffer in buffers(optimizer):
            buffer.normal_(generator=generator)
        optimizer.sharded.prepare_grads()
        for limit in LIMITS:
            norm, gradients = clipped(optimizer, type(optimizer.sharded), limit)
            expected, references = clipped(optimizer, DistributedOptimizer, limit)
            # Float32 sums of 10^5 squares in another order.
            assert math.isclose(norm, expected, rel_tol=1e-6), (norm, expected)
            for gradient, reference in zip(gradients, references, strict=True):
                torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=0)
        return count


def test_norm_and_clipping_are_megatrons_and_count_every_gradient_once(alone: Ranks) -> None:
    configs = [load("clip", [*SMALL, *overrides]) for overrides in LAYOUTS.values()]
    first, second = run_ranks(compare, 2, configs)
    assert first == second
    towers = build_clip(load("clip", SMALL), torch.float32, alone.device)
    whole = sum(weight.numel() for tower in towers for weight in tower.chunks[0].parameters())
    expected = {name: whole - (name == "fixed scale") for name in LAYOUTS}
    # A weight more or less is 3e-5; float32 sums of so many ones are exact.
    assert dict(zip(LAYOUTS, first, strict=True)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_shows_in_the_norm(value: float, alone: Ranks) -> None:
    optimizer = build(load("clip", SMALL), alone)
    weight = next(optimizer.wrapped[1].parameters())
    weight.main_grad.flatten()[3] = value
    before = weight.detach().clone()
    norm = optimizer.step(1.0)
    assert not math.isfinite(norm)
    assert torch.equal(weight, before), "and in no weight"
