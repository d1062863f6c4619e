"""The summary loss against its definition."""

import pytest
import torch

from w2s.objectives.summary import summary_loss


def test_the_loss_is_its_definition() -> None:
    """Image by image in float64, loss and gradients: float32 rounds to 6e-8, sums of 48 products gather a few."""
    generator = torch.Generator().manual_seed(0)
    targets = 7 * torch.randn(6, 48, generator=generator) + 2
    ours = torch.randn(6, 48, generator=generator).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    loss = summary_loss(ours, targets)
    cosines = [
        (prediction @ target) / ((prediction @ prediction).sqrt() * (target @ target).sqrt())
        for prediction, target in zip(theirs, targets.double(), strict=True)
    ]
    by_hand = -sum(cosines) / 6
    loss.backward()
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-8)


def test_lengths_do_not_matter_and_bfloat16_is_compared_in_float32() -> None:
    features = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss = summary_loss(features, 4 * features)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(-1.0, abs=1e-6)
