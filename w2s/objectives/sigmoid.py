"""SigLIP's sigmoid loss over the true global batch, in tiles, with its gradient in closed form.

Every pair is a question of its own, yes or no, so one pass over the tiles gives the loss and the gradient. With respect
to the logit l of a pair it is sigmoid(l) minus one for a positive and sigmoid(l) for a negative, over the batch size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.objectives.tiles import TILE, FeatureGradients, LogitTiles, Tile, with_known_gradients


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    group: ProcessGroup | None = None,
    labels: Tensor | None = None,
    tile: int = TILE,
) -> Tensor:
    """Return this rank's share of -1/N sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)).

    N is the global batch size, z_ij is 1 for a positive and -1 for a negative (Zhai et al. 2023, section 3.2). The mean
    over the ranks of `group` is the global loss, and the mean of their gradients is its gradient, as data-parallel
    training averages them.

    Args:
        images: [n, d], L2-normalised; every rank holds n of the N pairs.
        texts: [n, d], L2-normalised.
        scale: scalar, the inverse temperature.
        bias: scalar that is added to every logit.
        group: the data-parallel group; None is one process.
        labels: int64 [n]; pairs with equal labels are positives of each other. None makes every pair its own.
        tile: rows and columns of the logits that are in memory at a time.
    """
    with torch.no_grad():
        tiles = LogitTiles(images, texts, scale, labels, group, tile)
        gradients = FeatureGradients(tiles)
        loss, grad_bias = torch.zeros_like(bias), torch.zeros_like(bias)
        for part in tiles:
            part_loss, grad_logits = _loss_and_grad(part, bias)
            loss += part_loss
            grad_bias += grad_logits.sum()
            gradients.add(part, grad_logits)
        known = [*gradients.finish(1 / len(images)), grad_bias / len(images)]
    return with_known_gradients(loss / len(images), (images, texts, scale, bias), known)


def _loss_and_grad(tile: Tile, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of a tile's losses, and their gradient with respect to its logits."""
    signed_logits = tile.logits.add_(bias)  # how far each answer leans to the wrong side: -z_ij l_ij
    if tile.positives is None:
        return F.softplus(signed_logits).sum(), signed_logits.sigmoid()
    signed_logits = torch.where(tile.positives, -signed_logits, signed_logits)
    slope = signed_logits.sigmoid()
    return F.softplus(signed_logits).sum(), torch.where(tile.positives, -slope, slope)
