"""What the tiled losses share: known gradients, and memory that is linear in the batch."""

import pytest
import torch

from tests.objectives.pairs import features
from w2s.bench.cost import cost, in_fresh_process
from w2s.objectives.contrastive import contrastive_loss


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


def peak(count: int) -> float:
    inputs = [value.requires_grad_() for value in features(count)]
    contrastive_loss(*features(8))  # loads the libraries
    return cost(lambda: contrastive_loss(*inputs, tile=512).backward()).mib


def test_memory_is_that_of_tiles() -> None:
    # One matrix of 8192 x 8192 would be 256 MiB, a tile is 1 MiB.
    assert in_fresh_process(peak, 8192) < 32
