"""Ranks with Megatron's groups, and small towers for them."""

from collections.abc import Callable
from typing import Any

import torch

from tests.distributed import run_ranks
from w2s.config.sections import ParallelConfig, PrecisionConfig, VisionConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower, data_parallel, shard
from w2s.towers.initial import vision_rule
from w2s.towers.masked_student import MaskedStudent

SHAPE = VisionConfig(image_size=32, patch_size=8, layers=2, width=32, heads=2, mlp_width=64)
TARGET_WIDTH = 24


def run_split(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(ranks, *args)` on `world_size` data-parallel ranks; return what each gave."""
    return run_ranks(_call, world_size, fn, args)


def _call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with process_groups.initialize_groups(ParallelConfig(), torch.device("cpu")) as ranks:
        return fn(ranks, *args)


def make_student(
    parallel: ParallelConfig | None = None, dtype: torch.dtype = torch.float32
) -> ShardedTower[MaskedStudent]:
    """A student on one model-parallel rank, ready to be trained."""
    layout = parallel or ParallelConfig()

    def chunk(number: int) -> MaskedStudent:
        student = MaskedStudent(SHAPE, [Target(TARGET_WIDTH)], layout, dtype, number)
        init_parameters(student, vision_rule(SHAPE, post_norm=0.5), seed=1)
        return student

    return data_parallel(shard(chunk, layout, torch.device("cpu")), layout, PrecisionConfig())


def make_batch(ranks: Ranks, images: int = 8) -> dict[str, torch.Tensor]:
    """This rank's share of a batch of `images`: images, masks and targets."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(images, 3, SHAPE.image_size, SHAPE.image_size, generator=generator)
    targets = torch.randn(images, SHAPE.patches, TARGET_WIDTH, generator=generator)
    masks = torch.zeros(images, SHAPE.patches, dtype=torch.bool)
    masks[:, ::3] = True
    share = slice(ranks.data_rank, None, ranks.data_size)
    return {"images": pixels[share], "masks": masks[share], "targets": targets[share]}
