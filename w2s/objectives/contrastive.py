"""The contrastive loss over the true global batch, in tiles, with its gradient in closed form.

A rank holds the logits of its own images against all captions, a tile at a time. The loss of a row is the log of its
sum of exponentials minus that over its positives alone, and the same for a column; so its gradient by a logit is
(p - p+ + q - q+) / 2 over the batch size, with p and q the softmaxes over the row and the column, p+ and q+ those over
their positives. The logs of these sums (two numbers a row and a column) and two products a tile are all that is needed:
memory is linear in the batch, and four matrix products do the work of six.
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
        labels: int64 [n]; pairs with equal labels are positives of each other, of which any may be found (the
            MIL-NCE loss of Miech et al. 2020, equation 1). None makes every pair its own.
        tile: rows and columns of the logits that are in memory at a time.
    """
    return _Contrastive.apply(images, texts, scale, labels, group, tile)


@dataclass
class _Tile:
    """A part of the logits, and where the positives in it are (None where there are none)."""

    rows: slice
    columns: slice
    logits: Tensor
    positive: Tensor | None


@dataclass
class _Pairs:
    """The pairs that a rank sees: its own images [n, d] against the captions of all ranks [N, d]."""

    images: Tensor
    texts: Tensor
    labels: Tensor | None
    all_labels: Tensor | None
    first: int  # place of the first own pair among all
    scale: Tensor
    tile: int

    def tiles(self) -> Iterator[_Tile]:
        """Yield the logits, tile by tile."""
        for row in range(0, len(self.images), self.tile):
            rows = slice(row, min(row + self.tile, len(self.images)))
            for column in range(0, len(self.texts), self.tile):
                columns = slice(column, min(column + self.tile, len(self.texts)))
                logits = (self.images[rows] @ self.texts[columns].T).mul_(self.scale)
                yield _Tile(rows, columns, logits, self._positive(rows, columns, logits))

    def _positive(self, rows: slice, columns: slice, logits: Tensor) -> Tensor | None:
        if self.labels is not None and self.all_labels is not None:
            return self.labels[rows, None] == self.all_labels[columns]
        shift = columns.start - rows.start - self.first
        if shift >= logits.shape[0] or -shift >= logits.shape[1]:
            return None
        return torch.ones_like(logits, dtype=torch.bool).triu(-shift).tril(-shift)


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
        first = _rank(group) * len(images)
        all_labels = None if labels is None else _gather(labels, group)
        pairs = _Pairs(images, _gather(texts, group), labels, all_labels, first, scale.detach(), tile)
        rows, columns = _normalisers(pairs, group)
        image_gradient, text_gradient, scale_gradient = _gradients(pairs, rows, columns)
        ctx.gradients = image_gradient, _scatter_sum(text_gradient, group), scale_gradient
        own = columns[:, first : first + len(images)]
        return ((rows[0] - rows[1]).mean() + (own[0] - own[1]).mean()) / 2

    @staticmethod
    def backward(ctx: Any, *output: Tensor) -> Any:
        (factor,) = output
        image, text, scale = (factor * gradient for gradient in ctx.gradients)
        return image, text, scale, None, None, None


def _normalisers(pairs: _Pairs, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return the logs of the sums of exponentials, of all and of positives: own rows [2, n], all columns [2, N]."""
    rows = pairs.images.new_full((2, len(pairs.images)), float("-inf"))
    columns = pairs.images.new_full((2, len(pairs.texts)), float("-inf"))
    for tile in pairs.tiles():
        kinds = [tile.logits]
        if tile.positive is not None:
            kinds.append(tile.logits.masked_fill(~tile.positive, float("-inf")))
        for kind, logits in enumerate(kinds):
            rows[kind, tile.rows] = torch.logaddexp(rows[kind, tile.rows], logits.logsumexp(1))
            columns[kind, tile.columns] = torch.logaddexp(columns[kind, tile.columns], logits.logsumexp(0))
    if _size(group) > 1:
        highest = columns.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        total = (columns - highest).exp()
        dist.all_reduce(total, group=group)
        columns = highest + total.log()
    return rows, columns


def _gradients(pairs: _Pairs, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by own images, by the captions of all ranks, and by the scale."""
    image_gradient, text_gradient = torch.zeros_like(pairs.images), torch.zeros_like(pairs.texts)
    scale_gradient = torch.zeros_like(pairs.scale)
    for tile in pairs.tiles():
        by_logit = _softmaxes(tile, rows[0], columns[0])
        if tile.positive is not None:
            # Beside the positives' sums another logit may overflow: it is left out, not multiplied by zero.
            by_logit -= torch.where(tile.positive, _softmaxes(tile, rows[1], columns[1]), 0.0)
        by_logit /= 2 * len(pairs.images)
        scale_gradient += (by_logit * tile.logits).sum() / pairs.scale
        by_logit *= pairs.scale
        image_gradient[tile.rows] += by_logit @ pairs.texts[tile.columns]
        text_gradient[tile.columns] += by_logit.T @ pairs.images[tile.rows]
    return image_gradient, text_gradient, scale_gradient


def _softmaxes(tile: _Tile, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum of a tile's softmaxes over rows and over columns, given the logs of their normalisers."""
    sum_of_both = (tile.logits - rows[tile.rows, None]).exp_()
    return sum_of_both.add_((tile.logits - columns[tile.columns]).exp_())


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
