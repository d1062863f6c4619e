"""What the configuration says reaches the optimizer."""

import math

import pytest
import torch

from tests.megatron.spawn import make_student, run_split
from w2s.config.load import load
from w2s.config.sections import OptimConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.parallel.optimizer import Optimizer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import data_parallel
from w2s.optim.parameter_groups import is_decayed
from w2s.towers.build import build_student


def longest_step(ranks: Ranks, optim: OptimConfig) -> float:
    """The largest change of a weight in a first step at random gradients."""
    config = load("mim", ["model=tiny"])
    student = build_student(config, [Target(8)], torch.float32, ranks.device)
    tower = data_parallel(student, config.parallel, config.precision)
    optimizer = Optimizer({"vision": tower}, optim, torch.float32)
    weights = list(tower.chunks[0].parameters())
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.main_grad.normal_(generator=torch.Generator().manual_seed(1))
    optimizer.step(1.0)
    # LAMB moves a weight of zeros by the learning rate, whatever the bounds.
    changes = [float((now - then).abs().max()) for now, then in zip(weights, before, strict=True) if then.norm() > 0]
    return max(changes)


def test_the_fused_update_is_adamws(alone: Ranks) -> None:
    """Five clipped steps with weight decay and a falling rate against torch's plain loop on whole weights."""
    config = load("mim", ["model=tiny", "optim.clip_grad=1", "optim.lr=1e-2"])
    tower = data_parallel(
        build_student(config, [Target(8)], torch.float32, alone.device), config.parallel, config.precision
    )
    optimizer = Optimizer({"vision": tower}, config.optim, torch.float32)
    weights = dict(tower.chunks[0].named_parameters())
    plain = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    groups = [
        {"params": [p], "weight_decay": config.optim.weight_decay * is_decayed(name, p)} for name, p in plain.items()
    ]
    reference = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps, foreach=False)
    for step in range(5):
        optimizer.zero_grad()
        for number, (name, weight) in enumerate(weights.items()):
            weight.main_grad.normal_(generator=torch.Generator().manual_seed(100 * step + number))
            plain[name].grad = weight.main_grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = config.optim.lr * (1 - step / 10)
        reference.step()
        assert float(optimizer.step(1 - step / 10)) == pytest.approx(float(norm), rel=1e-6)
    for name, weight in weights.items():
        # Some ten roundings of 6e-8 in each of five updates of 1e-2, and of weights up to 1.
        torch.testing.assert_close(weight, plain[name], rtol=1e-6, atol=1e-7)


def test_the_bounds_of_the_trust_ratio_reach_lamb(alone: Ranks) -> None:
    lamb = OptimConfig(name="lamb", lr=1e-2, clip_grad=0.0)
    bounded = OptimConfig(name="lamb", lr=1e-2, clip_grad=0.0, trust_ratio=(1e-3, 1e-3))
    # The entries of a first update are 1 and the weight decay, here at most 0.05 x 1; 1e-7 is the rounding of a weight.
    assert 0.9e-5 < longest_step(alone, bounded) < 1.06e-5 + 1e-7
    assert longest_step(alone, lamb) > 1e-3


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_leaves_no_trace(alone: Ranks, name: str, dtype: torch.dtype) -> None:
    """Steps with a gradient or a loss that is not a number in between, the first one too, against a run without
    them."""

    def train(bad: bool) -> tuple[list[torch.Tensor], Optimizer]:
        config = load("mim", ["model=tiny", f"optim.name={name}"])
        tower = data_parallel(
            build_student(config, [Target(8)], dtype, alone.device), config.parallel, config.precision
        )
        optimizer = Optimizer({"vision": tower}, config.optim, dtype)
        weights = list(tower.chunks[0].parameters())

        def step(seed: int, loss: float = 1.0, value: float | None = None) -> None:
            optimizer.zero_grad()
            for number, weight in enumerate(weights):
                weight.main_grad.normal_(generator=torch.Generator().manual_seed(100 * seed + number))
            if value is not None:
                weights[3].main_grad.view(-1)[0] = value
            optimizer.step(1.0, torch.tensor(loss))

        for seed in range(3):
            if bad:
                step(50 + seed, value=(math.nan, math.inf, -math.inf)[seed])
                step(60 + seed, loss=(math.nan, math.inf, math.nan)[seed])
            step(seed)
        return [weight.detach().clone() for weight in weights], optimizer

    (clean, one), (marred, other) = train(bad=False), train(bad=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(marred, clean, strict=True))
    assert (int(one.guard.skipped), int(other.guard.skipped), int(other.guard.consecutive_skips)) == (0, 6, 0)
    states = [list(each.sharded.optimizer.state.values()) for each in (one, other)]
    for ours, theirs in zip(*states, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def _step_with_a_bad_rank(ranks: Ranks) -> tuple[bool, int]:
    tower = make_student()
    optimizer = Optimizer({"vision": tower}, OptimConfig(), torch.float32)
    weights = list(tower.chunks[0].parameters())
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.main_grad.fill_(math.nan if ranks.rank == 1 else 1.0)
    tower.wrapped[0].finish_grad_sync()
    optimizer.step(1.0)
    unchanged = all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))
    return unchanged, int(optimizer.guard.skipped)


def test_all_ranks_skip_what_one_of_them_cannot_use() -> None:
    assert run_split(_step_with_a_bad_rank, 2) == [(True, 1)] * 2
