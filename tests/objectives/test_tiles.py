"""What the tiled losses share: known gradients, and memory that is linear in the batch."""

import pytest
import torch

from tests.objectives.pairs import features
from w2s.bench.call_cost import cost, in_fresh_process
from w2s.objectives.contrastive import contrastive_loss
from w2s.objectives.sigmoid import sigmoid_loss


def test_gradient_is_scaled_by_what_comes_back() -> None:
    inputs = [value.requires_grad_() for value in features(9)]
    once = torch.autograd.grad(contrastive_loss(*inputs), inputs)
    thrice = torch.autograd.grad(3 * contrastive_loss(*inputs), inputs)
    torch.testing.assert_close(thrice, tuple(3 * gradient for gradient in once))


def test_a_second_backward_pass_is_refused() -> None:
    """The first one has scaled the gradients in place: a second one would scale them again."""
    inputs = [value.requires_grad_() for value in features(9)]
    loss = contrastive_loss(*inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("labelled", [False, True])
def test_nothing_is_read_back_from_the_device(labelled: bool) -> None:
    """Tensors without values stand for those of a GPU: reading one fails."""
    images, texts, scale, bias = (
        torch.empty(shape, device="meta", requires_grad=True) for shape in ((9, 4), (9, 4), (), ())
    )
    labels = torch.empty(9, dtype=torch.int64, device="meta") if labelled else None
    contrastive_loss(images, texts, scale, labels=labels, tile=4).backward()
    sigmoid_loss(images, texts, scale, bias, labels=labels, tile=4).backward()
    assert all(value.grad is not None and value.grad.is_meta for value in (images, texts, scale, bias))
    with pytest.raises(RuntimeError, match="meta"):
        scale.item()


def peak(count: int) -> float:
    inputs = [value.requires_grad_() for value in features(count)]
    contrastive_loss(*features(8))  # loads the libraries
    return cost(lambda: contrastive_loss(*inputs, tile=256).backward()).mib


def test_memory_is_that_of_tiles() -> None:
    # One matrix of 4096 x 4096 would be 64 MiB, a tile is a quarter of one.
    assert in_fresh_process(peak, 4096) < 16
