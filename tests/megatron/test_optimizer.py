"""What the configuration says reaches the optimizer."""

import torch

from w2s.config.load import load
from w2s.config.sections import OptimConfig
from w2s.megatron.groups import Ranks
from w2s.megatron.optimizer import Optimizer
from w2s.megatron.sharded import data_parallel
from w2s.towers.build import build_student


def longest_step(ranks: Ranks, optim: OptimConfig) -> float:
    """The largest change of a weight in a first step at random gradients."""
    config = load("mim", ["model=tiny"])
    student = build_student(config, 8, torch.float32, ranks.device)
    tower = data_parallel(student, config.parallel, config.precision)
    optimizer = Optimizer({"vision": tower}, optim, torch.float32)
    weights = list(tower.parts[0].parameters())
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.main_grad.normal_(generator=torch.Generator().manual_seed(1))
    optimizer.step(1.0)
    # LAMB moves a weight of zeros by the learning rate, whatever the bounds.
    changes = [float((now - then).abs().max()) for now, then in zip(weights, before, strict=True) if then.norm() > 0]
    return max(changes)


def test_the_bounds_of_the_trust_ratio_reach_lamb(alone: Ranks) -> None:
    lamb = OptimConfig(name="lamb", lr=1e-2, clip_grad=0.0)
    bounded = OptimConfig(name="lamb", lr=1e-2, clip_grad=0.0, trust_ratio=(1e-3, 1e-3))
    # The entries of a first update are 1 and the weight decay, here at most 0.05 x 1; 1e-7 is the rounding of a weight.
    assert 0.9e-5 < longest_step(alone, bounded) < 1.06e-5 + 1e-7
    assert longest_step(alone, lamb) > 1e-3
