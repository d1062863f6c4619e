"""Features, and the contrastive losses from their definitions in float64."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-5
"""Of the largest entry, for float32 sums of at most 100 products."""

Loss = Callable[..., Tensor]


def features(count: int, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and scale."""
    generator = torch.Generator().manual_seed(count)
    images, texts = (F.normalize(torch.randn(count, width, generator=generator), dim=-1) for _ in range(2))
    return images, texts, torch.tensor(14.0)


def positives(count: int, labels: Tensor | None) -> Tensor:
    labels = torch.arange(count) if labels is None else labels
    return labels[:, None] == labels[None]


def softmax_definition(images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor | None = None) -> Tensor:
    logits, positive = scale * images @ texts.T, positives(len(images), labels)
    shares = [(side.softmax(1) * positive).sum(1).log().mean() for side in (logits, logits.T)]
    return -(shares[0] + shares[1]) / 2


def sigmoid_definition(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None = None
) -> Tensor:
    signs = 2.0 * positives(len(images), labels) - 1
    return -(signs * (scale * images @ texts.T + bias)).sigmoid().log().sum() / len(images)


def with_known_gradients(loss: Loss, inputs: Sequence[Tensor], **options: object) -> list[Tensor]:
    """The loss, and its gradients by all inputs."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def exactly(definition: Loss, inputs: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
    """What `with_known_gradients` should give, in float64."""
    return with_known_gradients(definition, [value.double() for value in inputs], labels=labels)


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for name, value, reference in zip(("loss", "images", "texts", "scale", "bias"), ours, theirs, strict=False):
        error = (value.double() - reference.double()).abs().max() / reference.double().abs().max()
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"
    assert len(ours) == len(theirs)
