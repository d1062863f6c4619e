"""LAMB against a few independent lines in float64."""

import pytest
import torch
from torch import Tensor

from w2s.optim.lamb import Lamb

LR, BETAS, EPS = 0.02, (0.9, 0.95), 1e-6


def gradient(step: int, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def reference(weight: Tensor, steps: int, decay: float) -> Tensor:
    weight, m, v = weight.double().clone(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for step in range(1, steps + 1):
        g = gradient(step, weight.shape)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        update = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS) + decay * weight
        weight = weight - LR * weight.norm() / update.norm() * update
    return weight


def lamb(weight: Tensor, steps: int, decay: float, pieces: int = 1) -> Tensor:
    """Train a weight that is held in `pieces` slices."""
    slices = [torch.nn.Parameter(piece.clone()) for piece in weight.float().flatten().chunk(pieces)]
    optimizer = Lamb(slices, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    if pieces > 1:
        optimizer.share(dict.fromkeys(slices, 0), 1, lambda squares: squares)
    for step in range(1, steps + 1):
        for parameter, piece in zip(slices, gradient(step, weight.shape).float().flatten().chunk(pieces), strict=True):
            parameter.grad = piece
        optimizer.step()
    return torch.cat([piece.detach() for piece in slices]).view_as(weight)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("pieces", [1, 3])
def test_equals_the_definition(decay: float, pieces: int) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(9)) * 3
    # Five steps in float32 against float64.
    torch.testing.assert_close(
        lamb(weight, 5, decay, pieces).double(), reference(weight, 5, decay), rtol=1e-5, atol=1e-5
    )


def test_trust_ratio_acts_at_weight_decay_zero() -> None:
    weight = torch.randn(40, generator=torch.Generator().manual_seed(0))
    small, large = (lamb(weight * size, 1, decay=0.0) - weight * size for size in (1.0, 100.0))
    # Without the ratio both steps would be as long.
    assert float(large.norm() / small.norm()) == pytest.approx(100, rel=1e-4)
    assert float(small.norm()) == pytest.approx(LR * float(weight.norm()), rel=1e-4)


def test_a_tensor_of_zeros_moves() -> None:
    assert float(lamb(torch.zeros(4), 1, decay=0.0).abs().max()) == pytest.approx(LR, rel=1e-4)
