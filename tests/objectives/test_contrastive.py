"""The tiled softmax loss against its definition in float64."""

import pytest
import torch
from open_clip.loss import ClipLoss

from tests.objectives.pairs import assert_close, exactly, features, softmax_definition, with_known_gradients
from w2s.objectives.contrastive import contrastive_loss


@pytest.mark.parametrize("tile", [1, 7, 16, 1000])
def test_equals_the_definition(tile: int) -> None:
    inputs = features(33)
    assert_close(with_known_gradients(contrastive_loss, inputs, tile=tile), exactly(softmax_definition, inputs))


def test_equals_open_clip() -> None:
    inputs = features(20)
    assert_close(with_known_gradients(contrastive_loss, inputs), with_known_gradients(ClipLoss(), inputs))


def test_any_of_the_captions_with_an_equal_label_may_be_found() -> None:
    inputs, labels = features(33), torch.arange(33) % 10
    ours = with_known_gradients(contrastive_loss, inputs, labels=labels, tile=8)
    assert_close(ours, exactly(softmax_definition, inputs, labels))


def test_images_of_one_caption_are_not_pushed_apart() -> None:
    """With one caption for all there is nothing to tell apart; as negatives, the images repel each other."""
    images, texts, scale = features(6)
    inputs = images, texts[:1].expand(6, -1), scale
    apart = with_known_gradients(contrastive_loss, inputs)
    together = with_known_gradients(contrastive_loss, inputs, labels=torch.zeros(6, dtype=torch.int64))
    assert float(together[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(together[1].abs().max()) < 1e-6
    assert float(apart[1].abs().max()) > 1e-2


@pytest.mark.parametrize("labelled", [False, True])
def test_wrong_pairs_at_the_highest_scale_do_not_overflow(labelled: bool) -> None:
    """A positive at -100 beside a negative at +100: e^200 is not a float32."""
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    inputs = images, images.flip(0), torch.tensor(100.0)
    labels = torch.arange(2) if labelled else None
    ours = with_known_gradients(contrastive_loss, inputs, labels=labels, tile=1)
    assert_close(ours, exactly(softmax_definition, inputs, labels))
