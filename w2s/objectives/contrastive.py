"""CLIP's softmax loss over the true global batch, in tiles, with its gradient in closed form.

The loss of a row of logits is the log of its sum of exponentials minus that over its positives alone, and the same for
a column; so its gradient with respect to a logit is (p - p+ + q - q+) / 2 over the batch size, with p and q the
softmaxes over the row and the column, p+ and q+ those over their positives. The logs of these sums (two numbers per
row and column) are all that is needed: one product per tile finds them, three more the gradients, four in all where
autograd takes six.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.objectives.collectives import logsumexp
from w2s.objectives.tiles import TILE, FeatureGradients, LogitTiles, Tile, with_known_gradients


def contrastive_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    labels: Tensor | None = None,
    tile: int = TILE,
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
    with torch.no_grad():
        tiles = LogitTiles(images, texts, scale, labels, group, tile)
        row_lse, column_lse = log_sum_exps(tiles)
        gradients = FeatureGradients(tiles)
        for part in tiles:
            gradients.add(part, _grad_logits(part, row_lse, column_lse))
        local_lse = column_lse[:, tiles.offset : tiles.offset + len(images)]
        loss = ((row_lse[0] - row_lse[1]).mean() + (local_lse[0] - local_lse[1]).mean()) / 2
        known = gradients.finish(1 / (2 * len(images)))
    return with_known_gradients(loss, (images, texts, scale), known)


def log_sum_exps(tiles: LogitTiles) -> tuple[Tensor, Tensor]:
    """Return the logs of the sums of exponentials, of all and of positives: own rows [2, n], all columns [2, N]."""
    row_lse = tiles.images.new_full((2, len(tiles.images)), float("-inf"))
    column_lse = tiles.images.new_full((2, len(tiles.texts)), float("-inf"))
    for tile in tiles:
        kinds = [tile.logits]
        if tile.positives is not None:
            kinds.append(tile.logits.masked_fill(~tile.positives, float("-inf")))
        for kind, logits in enumerate(kinds):
            row_lse[kind, tile.rows] = torch.logaddexp(row_lse[kind, tile.rows], logits.logsumexp(1))
            column_lse[kind, tile.columns] = torch.logaddexp(column_lse[kind, tile.columns], logits.logsumexp(0))
    return row_lse, logsumexp(column_lse, tiles.group)


def _grad_logits(tile: Tile, row_lse: Tensor, column_lse: Tensor) -> Tensor:
    """Return the gradient with respect to a tile's logits, times twice the number of own images."""
    grad_logits = _softmaxes(tile, row_lse[0], column_lse[0])
    if tile.positives is not None:
        # Beside the positives' sums another logit may overflow: it is left out, not multiplied by zero.
        grad_logits -= torch.where(tile.positives, _softmaxes(tile, row_lse[1], column_lse[1]), 0.0)
    return grad_logits


def _softmaxes(tile: Tile, row_lse: Tensor, column_lse: Tensor) -> Tensor:
    """Return the sum of a tile's softmaxes over rows and over columns, given the log-sum-exps of these."""
    by_row, by_column = log_softmaxes(tile, row_lse, column_lse)
    return by_row.exp_().add_(by_column.exp_())


def log_softmaxes(tile: Tile, row_lse: Tensor, column_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logs of a tile's softmaxes over rows and over columns, given the log-sum-exps of these."""
    return tile.logits - row_lse[tile.rows, None], tile.logits - column_lse[tile.columns]
