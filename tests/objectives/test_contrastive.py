"""The tiled contrastive loss against a naive one in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from tests.distributed import run_ranks
from w2s.objectives.contrastive import contrastive_loss

TOLERANCE = 1e-5
"""Relative, for float32 sums of at most 100 products."""


def features(count: int, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images, texts = (F.normalize(torch.randn(count, width, generator=generator), dim=-1) for _ in range(2))
    return images, texts, torch.tensor(14.0)


def naive(images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor | None = None) -> list[Tensor]:
    """Loss and gradients by images, texts and scale, from the definition, in float64."""
    inputs = [value.double().requires_grad_() for value in (images, texts, scale)]
    logits = inputs[2] * inputs[0] @ inputs[1].T
    labels = torch.arange(len(images)) if labels is None else labels
    positive = labels[:, None] == labels[None]
    shares = [(side.softmax(1) * positive).sum(1).log().mean() for side in (logits, logits.T)]
    loss = -sum(shares) / 2
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def tiled(images: Tensor, texts: Tensor, scale: Tensor, **options: object) -> list[Tensor]:
    inputs = [value.clone().requires_grad_() for value in (images, texts, scale)]
    loss = contrastive_loss(*inputs, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for name, value, reference in zip(("loss", "images", "texts", "scale"), ours, theirs, strict=True):
        error = (value.double() - reference.double()).abs().max() / reference.double().abs().max()
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tile", [1, 7, 16, 1000])
def test_equals_the_definition(tile: int) -> None:
    assert_close(tiled(*features(33), tile=tile), naive(*features(33)))


def test_equals_open_clip() -> None:
    images, texts, scale = features(20)
    inputs = [value.clone().requires_grad_() for value in (images, texts, scale)]
    loss = ClipLoss()(*inputs)
    assert_close(tiled(images, texts, scale), [loss.detach(), *torch.autograd.grad(loss, inputs)])


def test_any_of_the_captions_with_an_equal_label_may_be_found() -> None:
    labels = torch.arange(33) % 10
    assert_close(tiled(*features(33), labels=labels, tile=8), naive(*features(33), labels))


def test_images_of_one_caption_are_not_pushed_apart() -> None:
    """With one caption for all there is nothing to tell apart; as negatives, the images repel each other."""
    images, texts, scale = features(6)
    same = texts[:1].expand(6, -1)
    apart = tiled(images, same, scale)
    together = tiled(images, same, scale, labels=torch.zeros(6, dtype=torch.int64))
    assert float(together[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(together[1].abs().max()) < 1e-6
    assert float(apart[1].abs().max()) > 1e-2


@pytest.mark.parametrize("labelled", [False, True])
def test_wrong_pairs_at_the_highest_scale_do_not_overflow(labelled: bool) -> None:
    """A positive at -100 beside a negative at +100: e^200 is no float32."""
    images = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    texts, scale = images.flip(0), torch.tensor(100.0)
    labels = torch.arange(2) if labelled else None
    assert_close(tiled(images, texts, scale, labels=labels, tile=1), naive(images, texts, scale, labels))


def test_gradient_is_scaled_by_what_comes_back() -> None:
    images, texts, scale = features(9)
    images.requires_grad_()
    (3 * contrastive_loss(images, texts, scale)).backward()
    torch.testing.assert_close(images.grad, 3 * naive(*features(9))[1].float())


def share(count: int, labelled: bool) -> list[Tensor]:
    """What this rank contributes, as its part of the whole."""
    rank, size = dist.get_rank(), dist.get_world_size()
    images, texts, scale = features(count)
    own = slice(rank * count // size, (rank + 1) * count // size)
    labels = (torch.arange(count) % 5)[own] if labelled else None
    loss, *gradients = tiled(images[own], texts[own], scale, labels=labels, group=dist.group.WORLD, tile=3)
    return [loss, *gradients]


@pytest.mark.parametrize("labelled", [False, True])
def test_two_ranks_average_to_the_global_batch(labelled: bool) -> None:
    parts = run_ranks(share, 2, 16, labelled)
    loss, scale = ((parts[0][i] + parts[1][i]) / 2 for i in (0, 3))
    images, texts = (torch.cat([part[i] for part in parts]) / 2 for i in (1, 2))
    labels = torch.arange(16) % 5 if labelled else None
    assert_close([loss, images, texts, scale], naive(*features(16), labels))


def twin_share() -> Tensor:
    """Pair 0 of rank 0 and pair 0 of rank 1 are the same pair."""
    images, texts, scale = features(4)
    images[2], texts[2] = images[0], texts[0]
    own = slice(0, 2) if dist.get_rank() == 0 else slice(2, 4)
    return contrastive_loss(images[own], texts[own], scale, group=dist.group.WORLD)


def test_twins_on_two_ranks_are_negatives_once() -> None:
    images, texts, scale = features(4)
    images[2], texts[2] = images[0], texts[0]
    losses = run_ranks(twin_share, 2)
    assert float(sum(losses) / 2) == pytest.approx(float(naive(images, texts, scale)[0]), rel=TOLERANCE)
