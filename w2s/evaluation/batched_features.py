"""Features of many images or texts, and scores of these, the work split over ranks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.evaluation.images import ImageBatch

Encoder = Callable[[Tensor], Tensor]
"""Inputs [b, ...] to features [b, d]; moves them to its own device."""
Tokenizer = Callable[[list[str]], Tensor]
"""Texts to tokens, int64 [n, context length]."""

AT_A_TIME = 16
"""Batches of each rank that are exchanged at a time."""

Batch = TypeVar("Batch", covariant=True)


class Items(Protocol[Batch]):
    """What can be encoded batch by batch."""

    def __len__(self) -> int:
        """Return their number, at least 1."""

    def batches(self, ranges: Sequence[range]) -> Iterator[Batch]:
        """Return batches, each of the items at some places."""


class TensorItems:
    """The rows of a tensor [n, ...] as items."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __len__(self) -> int:
        return len(self._tensor)

    def batches(self, ranges: Sequence[range]) -> Iterator[Tensor]:
        """Return slices [b, ...]."""
        return (self._tensor[each.start : each.stop] for each in ranges)


def of_images(encode: Encoder) -> Callable[[ImageBatch], Tensor]:
    """An encoder of uint8 images [b, 3, S, S] as one of batches of images or clips."""
    return lambda batch: over_frames(encode)(batch.images)


def over_frames(encode: Encoder) -> Encoder:
    """Let an encoder of images [b, 3, S, S] take clips [b, frames, 3, S, S] too: the mean of their frames' features.

    A batch of clips whose frames are all equal is encoded once.
    """

    def mean(images: Tensor) -> Tensor:
        if images.ndim == 4:
            return encode(images)
        if (images == images[:, :1]).all():
            return encode(images[:, 0])
        return encode(images.flatten(0, 1)).unflatten(0, (len(images), -1)).mean(1)

    return mean


@torch.no_grad()
def encode_all(
    encode: Callable[[Any], Tensor], items: Items[Any], batch_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Features of all items, in order, on every rank.

    Rank r of w encodes the batches r, r + w, ..., and asks for no others: a batch holds the same items however many
    ranks there are, so the result does not depend on their number. All ranks call `encode` equally often; surplus calls
    repeat a batch.

    Args:
        encode: the model: a batch of items to features [b, d].
        items: the same on every rank.
        batch_size: items of one call; the last batch may be smaller.
        group: ranks that share the work; None for this process alone.

    Returns:
        Features [n, d] on the model's device, in the type that it returns.
    """
    ranges = [range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size)]
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    rounds = -(-len(ranges) // size)
    local = [encode(batch) for batch in items.batches([ranges[(n * size + rank) % len(ranges)] for n in range(rounds)])]
    if size == 1:
        return torch.cat(local)
    whole = local[0].new_empty(len(items), local[0].shape[1])
    for first in range(0, rounds, AT_A_TIME):
        parts = [local[step] for step in range(first, min(first + AT_A_TIME, rounds))]
        place = first * size * batch_size
        part = whole[place : place + len(parts) * size * batch_size]
        part.copy_(_exchanged(parts, min(batch_size, len(items)), group)[: len(part)])
    return whole


def score_all(
    score: Callable[[Tensor], Tensor], features: Tensor, block: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Scores of all features, in order, on every rank; each rank computes some blocks, as `encode_all` does.

    Args:
        score: indices of some features, int64 [b], to what is known of each, [b, c].
        features: [n, d], the same on every rank.
        block: features of one call.
        group: ranks that share the work; None for this process alone.

    Returns:
        [n, c], in the type that `score` returns.
    """
    return encode_all(score, TensorItems(torch.arange(len(features), device=features.device)), block, group)


def _exchanged(local: list[Tensor], batch_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """The features of some batches of each rank in the order of the items, each batch filled up to its full size."""
    padded = local[0].new_zeros(len(local), batch_size, local[0].shape[1])
    for step, features in enumerate(local):
        padded[step, : len(features)] = features
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, padded, group=group)
    return torch.stack(gathered, 1).flatten(0, 2)
