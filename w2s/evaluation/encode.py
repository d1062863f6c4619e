"""Features of many images or texts, the work split over ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Encoder = Callable[[Tensor], Tensor]
"""Inputs [b, ...] to features [b, d]; moves them to its own device."""
Tokenizer = Callable[[list[str]], Tensor]
"""Texts to tokens, int64 [n, context length]."""


def over_frames(encode: Encoder) -> Encoder:
    """Let an encoder of images [b, 3, S, S] take clips [b, frames, 3, S, S] too: the mean of their frames' features.

    A batch of images that stand still in all frames is encoded once.
    """

    def mean(images: Tensor) -> Tensor:
        if images.ndim == 4:
            return encode(images)
        if (images == images[:, :1]).all():
            return encode(images[:, 0])
        return encode(images.flatten(0, 1)).unflatten(0, (len(images), -1)).mean(1)

    return mean


@torch.no_grad()
def encode_all(encode: Encoder, items: Tensor, batch_size: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Features of all items, in order, on every rank.

    Rank r of w encodes the batches r, r + w, ...: a batch holds the same items however many ranks there are, so the
    result does not depend on their number. All ranks call `encode` equally often; surplus calls repeat a batch.

    Args:
        encode: the model.
        items: inputs [n, ...] with n >= 1, the same on every rank.
        batch_size: items of one call; the last batch may be smaller.
        group: ranks that share the work; None for this process alone.

    Returns:
        Features [n, d] on the model's device, in the type that it returns.
    """
    batches = items.split(batch_size)
    if group is None:
        return torch.cat([encode(batch) for batch in batches])
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rounds = -(-len(batches) // size)
    own = [encode(batches[(step * size + rank) % len(batches)]) for step in range(rounds)]
    padded = own[0].new_zeros(rounds, min(batch_size, len(items)), own[0].shape[1])
    for step, features in enumerate(own):
        padded[step, : len(features)] = features
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return torch.stack(gathered, 1).flatten(0, 2)[: len(items)]
