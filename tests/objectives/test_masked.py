"""The masked-feature loss."""

import pytest
import torch

from w2s.objectives.masked import constant_cosine, masked_cosine_loss, masked_cosines


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
