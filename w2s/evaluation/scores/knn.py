"""Weighted k-nearest-neighbour classification of features (Wu et al. 2018, as DINO evaluates)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from w2s.evaluation.batched_features import score_all
from w2s.evaluation.scores.ranking import one_hot, rank_of_right

BLOCK = 256
"""Images whose neighbours are looked up at a time."""
GALLERY_BLOCK = 1 << 15
"""Neighbours that are looked through at a time."""
TEMPERATURE = 0.07


def knn(
    features: Tensor,
    labels: Tensor,
    neighbours: Tensor,
    neighbour_labels: Tensor,
    *,
    k: int,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Classify by the k nearest neighbours in cosine, each voting for its class with `exp(cosine / 0.07)`.

    Of equally near neighbours the earlier one counts, of classes with equal votes the lower number; a class without a
    vote is never right.

    Args:
        features: [n, d], not normalised.
        labels: int64 [n].
        neighbours: features that are looked through, [m, d].
        neighbour_labels: int64 [m].
        k: neighbours that vote; all of them where there are fewer.
        group: ranks that share the work; None for this process alone.

    Returns:
        top1, top5 and, for the classes that neighbours have, chance_top1; fractions of 1.
    """
    gallery = F.normalize(neighbours.float(), dim=-1)
    labels, neighbour_labels = labels.to(gallery.device), neighbour_labels.to(gallery.device)
    classes = int(max(labels.max(), neighbour_labels.max())) + 1

    def score(indices: Tensor) -> Tensor:
        return _ranks(features[indices], labels[indices], gallery, neighbour_labels, k, classes)[:, None]

    ranks = score_all(score, features, BLOCK, group)
    return {
        "top1": (ranks < 1).double().mean().item(),
        "top5": (ranks < 5).double().mean().item(),
        "chance_top1": 1 / len(neighbour_labels.unique()),
    }


def _ranks(features: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int, classes: int) -> Tensor:
    """Rank of the true class by votes, beyond every k where it has none."""
    nearest, index = _nearest(F.normalize(features.float(), dim=-1), gallery, k)
    weights = (nearest / TEMPERATURE).exp()
    votes = weights.new_zeros(len(features), classes).scatter_add(1, gallery_labels[index], weights)
    ranks = rank_of_right(votes, one_hot(labels, classes))
    voteless = votes.gather(1, labels[:, None])[:, 0] == 0
    return ranks.masked_fill(voteless, torch.iinfo(ranks.dtype).max)


def _nearest(units: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and indices of the k nearest of the gallery, [n, at most k] each; of equal ones the earlier first."""
    cosines, indices = (
        units.new_empty(len(units), 0),
        torch.empty(len(units), 0, dtype=torch.int64, device=units.device),
    )
    for first in range(0, len(gallery), GALLERY_BLOCK):
        block = gallery[first : first + GALLERY_BLOCK]
        block_indices = torch.arange(first, first + len(block), device=units.device).expand(len(units), -1)
        # Those found before stand first, and the sort leaves equal ones in their order.
        cosines, order = torch.cat([cosines, units @ block.T], 1).sort(dim=1, descending=True, stable=True)
        cosines, indices = cosines[:, :k], torch.cat([indices, block_indices], 1).gather(1, order[:, :k])
    return cosines, indices
