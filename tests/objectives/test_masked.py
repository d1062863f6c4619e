"""The masked-feature loss."""

import pytest
import torch

from w2s.objectives.masked import masked_cosine_loss, masked_cosines


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
