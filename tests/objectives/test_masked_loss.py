"""The masked-feature loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from w2s.objectives.masked_loss import LOSSES, constant_cosine, masked_cosine_loss, masked_cosines


def test_cosine_of_each_patch() -> None:
    predictions = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    targets = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert masked_cosines(predictions, targets).tolist() == pytest.approx([1.0, 0.5**0.5, -1.0])
    assert float(masked_cosine_loss(predictions, targets)) == pytest.approx(-(0.5**0.5) / 3)


def test_bfloat16_features_are_compared_in_float32() -> None:
    features = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = masked_cosine_loss(features, features)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(-1.0, abs=1e-6)


def test_no_constant_scores_more_than_the_best_one() -> None:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(200, 4, generator=generator) + torch.tensor([1.0, -2.0, 0.5, 0.0])
    best = float(constant_cosine(targets))
    others = torch.randn(500, 1, 4, generator=generator)
    assert max(float(masked_cosines(other.expand_as(targets), targets).mean()) for other in others) <= best
    direction = torch.nn.functional.normalize(targets, dim=-1).mean(0)
    assert float(masked_cosines(direction.expand_as(targets), targets).mean()) == pytest.approx(best, abs=1e-6)
    assert float(constant_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))) == 0.0


def naive_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return -(prediction @ target) / (prediction @ prediction).sqrt() / (target @ target).sqrt()


def naive_smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    parts = [(p - t) ** 2 / 2 if abs(p - t) < 1 else abs(p - t) - 0.5 for p, t in zip(prediction, target, strict=True)]
    return torch.stack(parts).mean()


def naive_mse(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.stack([(p - t) ** 2 for p, t in zip(prediction, target, strict=True)]).mean()


@pytest.mark.parametrize(
    ("name", "naive"), [("cosine", naive_cosine), ("smooth_l1", naive_smooth_l1), ("mse", naive_mse)]
)
def test_each_loss_is_its_definition(name: str, naive: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Patch by patch, channel by channel, in float64; errors on both sides of smooth L1's bend."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(2, 5, 8, generator=generator)
    ours = (targets + 2 * torch.randn(2, 5, 8, generator=generator)).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    loss = LOSSES[name](ours, targets)
    rows = zip(theirs.flatten(0, 1), targets.double().flatten(0, 1), strict=True)
    by_hand = torch.stack([naive(prediction, target) for prediction, target in rows]).mean()
    loss.backward()
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-8)
