"""Where the right answer stands in a list that is sorted by score."""

import torch
from torch import Tensor


def rank_of_right(scores: Tensor, right: Tensor) -> Tensor:
    """Number of wrong answers that stand before the best right one.

    Of equal scores the lower index stands first. Where the right score is not a number, every wrong answer does.

    Args:
        scores: [n, m], higher is better.
        right: bool [n, m], at least one true in every row.

    Returns:
        int64 [n], 0 where a right answer is first.
    """
    best = scores.masked_fill(~right, -torch.inf).argmax(1, keepdim=True)
    score = scores.gather(1, best)
    behind = (scores < score) | ((scores == score) & (torch.arange(scores.shape[1], device=scores.device) > best))
    return (~behind & ~right).sum(1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Bool [n, classes], true at the labels int64 [n]."""
    return labels[:, None] == torch.arange(classes, device=labels.device)
