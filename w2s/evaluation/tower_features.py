"""What a tower in training makes of images as they are decoded, without FP8, on every rank."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from w2s.data.samples.batch import normalize
from w2s.megatron.parallel.attention_maps import cls_attention
from w2s.megatron.parallel.pipeline_schedule import infer
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.towers.vision import VisionTower, channel_statistics


def tower_outputs(tower: ShardedTower[Any], images: Tensor, forward: Callable[..., Tensor]) -> Tensor:
    """Run a vision tower on images.

    Args:
        tower: the tower.
        images: uint8 [n, 3, S, S].
        forward: takes a chunk of it and normalised images; of the last chunk it returns [n, ...].
    """
    return infer(tower, (_normalized(tower, images),), forward, tower.chunks[0].shape.tokens)


def patch_features(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return the patch tokens after the final norm, CLS dropped: uint8 [n, 3, S, S] to [n, patches, width]."""
    return tower_outputs(tower, images, VisionTower.patch_tokens).float()


def attention_of_cls(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return what the CLS token, or a pool's probe, attends to last: uint8 [n, 3, S, S] to float32 [n, patches]."""
    return cls_attention(tower, _normalized(tower, images))


def _normalized(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    device = next(tower.chunks[0].parameters()).device
    return normalize(images.to(device), *channel_statistics(tower.chunks[0].shape))
