"""The contrastive loss over the true global batch, in tiles, with its gradient in closed form.

A rank holds the logits of its own images against all captions, a tile at a time. With p_ij the softmax over captions,
q_ij the softmax over images and y_ij the target distribution, the gradient of the loss by a logit is
(p_ij + q_ij) / 2 - y_ij, over the batch size. So the softmaxes' normalisers (one number a row and a column) and two
products a tile are all that is needed: memory is linear in the batch, and four matrix products do the work of six.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    labels: Tensor | None = None,
    tile: int = 2048,
) -> Tensor:
    """Return this rank's share of the symmetric cross entropy over the global batch (Radford et al. 2021, figure 3).

    The mean over the ranks of `group` is the global loss, and the mean of their gradients is its gradient, as
    data-parallel training averages them.

    Args:
        images: [n, d], L2-normalised; every rank holds n of the world_size * n pairs.
        texts: [n, d], L2-normalised.
        scale: scalar, the inverse temperature.
        group: the data-parallel group; None is one process.
        labels: int64 [n]; pairs with equal labels are positives of each other and share the target evenly.
            None makes every pair its own.
        tile: rows and columns of the logits that are in memory at a time.
    """
    return _Contrastive.apply(images, texts, scale, labels, group, tile)


@dataclass
class _Pairs:
    """The pairs that a rank sees: its own images against all captions."""

    images: Tensor  # [n, d]
    texts: Tensor  # [world * n, d]
    labels: Tensor  # [n]
    all_labels: Tensor  # [world * n]
    weights: Tensor  # [n], 1 / number of positives
    scale: Tensor
    tile: int

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and the logits there."""
        for row in range(0, len(self.images), self.tile):
            rows = slice(row, row + self.tile)
            for column in range(0, len(self.texts), self.tile):
                columns = slice(column, column + self.tile)
                yield rows, columns, (self.images[rows] @ self.texts[columns].T).mul_(self.scale)

    def targets(self, rows: slice, columns: slice) -> Tensor:
        """Return the target distribution of a tile: even over the positives of each row."""
        return (self.labels[rows, None] == self.all_labels[columns]) * self.weights[rows, None]


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        labels: Tensor | None,
        group: ProcessGroup | None,
        tile: int,
    ) -> Tensor:
        pairs = _collect(images, texts, scale, labels, group, tile)
        row_norm, column_norm = _normalisers(pairs, group)
        own = slice(_rank(group) * len(images), (_rank(group) + 1) * len(images))
        attraction, gradients = _gradients(pairs, row_norm, column_norm)
        image_gradient, text_gradient, scale_gradient = gradients
        ctx.gradients = image_gradient, _scatter_sum(text_gradient, group), scale_gradient
        return (row_norm.mean() + column_norm[own].mean()) / 2 - attraction

    @staticmethod
    def backward(ctx: Any, *output: Tensor) -> Any:
        (factor,) = output
        image, text, scale = (factor * gradient for gradient in ctx.gradients)
        return image, text, scale, None, None, None


def _collect(
    images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor | None, group: ProcessGroup | None, tile: int
) -> _Pairs:
    if labels is None:
        labels = torch.arange(len(images), device=images.device) + _rank(group) * len(images)
    all_labels = _gather(labels, group)
    _, place, count = all_labels.unique(return_inverse=True, return_counts=True)
    own = slice(_rank(group) * len(images), (_rank(group) + 1) * len(images))
    return _Pairs(images, _gather(texts, group), labels, all_labels, 1.0 / count[place][own], scale.detach(), tile)


def _normalisers(pairs: _Pairs, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return the log of the softmax's normaliser of each own row [n] and of each column over all ranks [world * n]."""
    row_norm = pairs.images.new_full((len(pairs.images),), float("-inf"))
    column_norm = pairs.images.new_full((len(pairs.texts),), float("-inf"))
    for rows, columns, logits in pairs.tiles():
        row_norm[rows] = torch.logaddexp(row_norm[rows], logits.logsumexp(1))
        column_norm[columns] = torch.logaddexp(column_norm[columns], logits.logsumexp(0))
    if _size(group) > 1:
        highest = column_norm.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        total = (column_norm - highest).exp()
        dist.all_reduce(total, group=group)
        column_norm = highest + total.log()
    return row_norm, column_norm


def _gradients(pairs: _Pairs, row_norm: Tensor, column_norm: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return the mean logit of the positives and the gradients by own images, all texts and the scale."""
    count = len(pairs.images)
    image_gradient, text_gradient = torch.zeros_like(pairs.images), torch.zeros_like(pairs.texts)
    attraction, scale_gradient = pairs.scale.new_zeros(()), pairs.scale.new_zeros(())
    for rows, columns, logits in pairs.tiles():
        targets = pairs.targets(rows, columns)
        attraction += (targets * logits).sum()
        by_logit = (logits - row_norm[rows, None]).exp_()
        by_logit += (logits - column_norm[columns]).exp_()
        by_logit = by_logit.div_(2).sub_(targets).div_(count)
        scale_gradient += (by_logit * logits).sum() / pairs.scale
        by_logit *= pairs.scale
        image_gradient[rows] += by_logit @ pairs.texts[columns]
        text_gradient[columns] += by_logit.T @ pairs.images[rows]
    return attraction / count, (image_gradient, text_gradient, scale_gradient)


def _rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if group is not None else 0


def _size(group: ProcessGroup | None) -> int:
    return dist.get_world_size(group) if group is not None else 1


def _gather(own: Tensor, group: ProcessGroup | None) -> Tensor:
    if _size(group) == 1:
        return own
    everyone = own.new_empty(_size(group) * len(own), *own.shape[1:])
    dist.all_gather_into_tensor(everyone, own.contiguous(), group=group)
    return everyone


def _scatter_sum(everyone: Tensor, group: ProcessGroup | None) -> Tensor:
    if _size(group) == 1:
        return everyone
    own = everyone.new_empty(len(everyone) // _size(group), *everyone.shape[1:])
    dist.reduce_scatter_tensor(own, everyone, group=group)
    return own
