"""The tiled sigmoid loss against its definition in float64."""

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from tests.objectives.pairs import assert_close, exactly, features, sigmoid_definition, with_known_gradients
from w2s.objectives.sigmoid import sigmoid_loss


def inputs(count: int) -> tuple[Tensor, ...]:
    return *features(count), torch.tensor(-3.0)


@pytest.mark.parametrize("tile", [1, 7, 16, 1000])
def test_equals_the_definition(tile: int) -> None:
    ours = with_known_gradients(sigmoid_loss, inputs(33), tile=tile)
    assert_close(ours, exactly(sigmoid_definition, inputs(33)))


def test_equals_open_clip() -> None:
    assert_close(with_known_gradients(sigmoid_loss, inputs(20)), with_known_gradients(SigLipLoss(), inputs(20)))


def test_every_caption_with_an_equal_label_is_a_positive() -> None:
    labels = torch.arange(33) % 10
    ours = with_known_gradients(sigmoid_loss, inputs(33), labels=labels, tile=8)
    assert_close(ours, exactly(sigmoid_definition, inputs(33), labels))


def test_a_sure_right_answer_costs_almost_nothing() -> None:
    """log sigmoid(30) is -9e-14; the difference of softplus(30) and 30 would be 0 or 2e-6 in float32."""
    images = torch.eye(2)
    loss = sigmoid_loss(images, images, torch.tensor(60.0), torch.tensor(-30.0))
    assert float(loss) == pytest.approx(2 * 9.36e-14, rel=1e-3)
