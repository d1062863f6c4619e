"""Where the CLS token looks in a tower's last layer, or the probe of its pool in the head: in any layout."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from w2s.megatron.parallel.pipeline_schedule import infer
from w2s.megatron.parallel.sharded import ShardedTower


def cls_attention(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return what the CLS token of the last layer attends to, mean over the heads; every rank of the model calls.

    Without such a token it is what the probe of the attention pool attends to.

    Args:
        tower: a vision tower, with a head if it has no CLS token.
        images: [n, 3, side, side], normalised, the same on every rank of the model-parallel group.

    Returns:
        float32 [n, patches]; with the weight of CLS itself, if there is one, a row would sum to 1.
    """
    return infer(tower, (images,), _look, tower.chunks[0].shape.tokens)


def _look(chunk: Any, images: Tensor) -> Tensor:
    if not chunk.last:
        return chunk.encode(images)
    if not chunk.shape.class_tokens:
        return _of_pool(chunk, images)
    captured: list[Tensor] = []
    attention = chunk.blocks.layers[-1].self_attention.core_attention
    handle = attention.register_forward_pre_hook(lambda module, inputs: captured.extend(inputs[:2]))
    try:
        chunk.encode(images)
    finally:
        handle.remove()
    # Packed tokens [n * tokens, 1, heads of this rank, head width].
    query, key = (packed.view(len(images), -1, *packed.shape[2:]).float() for packed in captured)
    scores = torch.einsum("nhd,nthd->nht", query[:, 0], key) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1)[..., 1:].mean(1)
    group = parallel_state.get_tensor_model_parallel_group()
    dist.all_reduce(weights, group=group)
    return weights / dist.get_world_size(group)


def _of_pool(chunk: Any, images: Tensor) -> Tensor:
    captured: list[Tensor] = []
    # In its forward pass: where weights are sharded, they are there no sooner.
    handle = chunk.head.register_forward_pre_hook(lambda pool, inputs: captured.append(pool.weights(*inputs)))
    try:
        chunk.embedding(chunk.encode(images), chunk.head)
    finally:
        handle.remove()
    return captured[0]
