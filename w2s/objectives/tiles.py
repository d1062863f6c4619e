"""The logits of all pairs of the global batch, a tile at a time, and the gradients that come back from them.

A rank goes through the logits of its own images against all captions. A loss that knows its gradient with respect to a
tile of them in closed form needs no memory but the tile: two products turn that gradient into those with respect to the
features. So memory is linear in the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from w2s.objectives.collectives import all_gather, rank, reduce_scatter

TILE = 1024
"""Rows and columns of a tile: on a CPU a few of them fit in the cache, and the products run at full speed."""


@dataclass
class Tile:
    """A part of the logits, and where the positives in it are (None where there are none)."""

    rows: slice
    columns: slice
    logits: Tensor
    positives: Tensor | None


class LogitTiles:
    """The pairs that a rank sees: its own images [n, d] against the captions of all ranks [N, d]."""

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        labels: Tensor | None,
        group: ProcessGroup | None,
        tile: int,
    ) -> None:
        self.images, self.texts, self.scale = images, all_gather(texts, group), scale
        self.labels, self.all_labels = labels, None if labels is None else all_gather(labels, group)
        self.group, self.tile = group, tile
        self.offset = rank(group) * len(images)  # of this rank's first pair among all

    def __iter__(self) -> Iterator[Tile]:
        """Yield the logits `scale * image . text`, tile by tile."""
        for rows in _slices(len(self.images), self.tile):
            for columns in _slices(len(self.texts), self.tile):
                logits = (self.images[rows] @ self.texts[columns].T).mul_(self.scale)
                yield Tile(rows, columns, logits, self._positive(rows, columns))

    def _positive(self, rows: slice, columns: slice) -> Tensor | None:
        if self.labels is not None and self.all_labels is not None:
            return self.labels[rows, None] == self.all_labels[columns]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        diagonal = self.offset + rows.start - columns.start
        if not -height < diagonal < width:
            return None
        return torch.ones(height, width, dtype=torch.bool, device=self.images.device).triu(diagonal).tril(diagonal)


class FeatureGradients:
    """The gradients with respect to own images, the captions of all ranks and the scale, added up tile by tile."""

    def __init__(self, tiles: LogitTiles) -> None:
        self.tiles = tiles
        self.images, self.texts = torch.zeros_like(tiles.images), torch.zeros_like(tiles.texts)

    def add(self, tile: Tile, grad_logits: Tensor) -> None:
        """Add a tile's part, given the gradient with respect to its logits up to a factor that all tiles share."""
        self.images[tile.rows].addmm_(grad_logits, self.tiles.texts[tile.columns])
        self.texts[tile.columns].addmm_(grad_logits.T, self.tiles.images[tile.rows])

    def finish(self, factor: float) -> list[Tensor]:
        """Return the gradients with respect to own images [n, d], own texts [n, d] and the scale, times `factor`."""
        # A logit is scale * image . text: what the images get, times the images, is what the scale gets.
        grad_scale = torch.einsum("nd,nd->n", self.images, self.tiles.images).sum() * factor
        texts = reduce_scatter(self.texts, self.tiles.group)
        weight = self.tiles.scale * factor
        return [self.images.mul_(weight), texts.mul_(weight), grad_scale]


def with_known_gradients(loss: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return `loss`, whose backward pass (one only) gives `inputs` the `gradients` that are known already."""
    return _PrecomputedGradients.apply(loss, gradients, *inputs)


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (factor,) = outputs
        # In place: no second copy of the features' size. Autograd refuses to use the saved tensors again after that.
        return None, None, *(gradient.mul_(factor) for gradient in ctx.saved_tensors)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
