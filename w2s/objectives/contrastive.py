"""CLIP's softmax loss over the true global batch, in tiles, with its gradient in closed form.

The loss of a row of logits is the log of its sum of exponentials minus that over its positives alone, and the same for
a column; so its gradient by a logit is (p - p+ + q - q+) / 2 over the batch size, with p and q the softmaxes over the
row and the column, p+ and q+ those over their positives. The logs of these sums (two numbers a row and a column) are
all that is needed: one product a tile finds them, three more the gradients, four in all where autograd takes six.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.objectives.collectives import logsumexp
from w2s.objectives.tiles import TILE, Gradients, Pairs, Tile, with_gradients


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
        pairs = Pairs(images, texts, scale, labels, group, tile)
        rows, columns = normalisers(pairs)
        gradients = Gradients(pairs)
        for part in pairs.tiles():
            gradients.add(part, _by_logit(part, rows, columns))
        own = columns[:, pairs.first : pairs.first + len(images)]
        loss = ((rows[0] - rows[1]).mean() + (own[0] - own[1]).mean()) / 2
        known = gradients.finish(1 / (2 * len(images)))
    return with_gradients(loss, (images, texts, scale), known)


def normalisers(pairs: Pairs) -> tuple[Tensor, Tensor]:
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
    return rows, logsumexp(columns, pairs.group)


def _by_logit(tile: Tile, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the gradient by a tile's logits, times twice the number of own images."""
    by_logit = _softmaxes(tile, rows[0], columns[0])
    if tile.positive is not None:
        # Beside the positives' sums another logit may overflow: it is left out, not multiplied by zero.
        by_logit -= torch.where(tile.positive, _softmaxes(tile, rows[1], columns[1]), 0.0)
    return by_logit


def _softmaxes(tile: Tile, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the sum of a tile's softmaxes over rows and over columns, given the logs of their normalisers."""
    by_row, by_column = log_softmaxes(tile, rows, columns)
    return by_row.exp_().add_(by_column.exp_())


def log_softmaxes(tile: Tile, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logs of a tile's softmaxes over rows and over columns, given the logs of their normalisers."""
    return tile.logits - rows[tile.rows, None], tile.logits - columns[tile.columns]
