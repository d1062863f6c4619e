"""What a rank holds of a tower: the chunks of its pipeline stage, wrapped for data parallelism for training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import nn

from w2s.config.sections import ParallelConfig, PrecisionConfig
from w2s.megatron import engine
from w2s.megatron.tower import Tower

AnyTower = TypeVar("AnyTower", bound=Tower)


@dataclass(frozen=True)
class ShardedTower(Generic[AnyTower]):
    """A tower split over tensor- and pipeline-parallel ranks.

    Attributes:
        parts: this rank's chunks, in the order of their layers; more than one with a virtual pipeline.
        chunks: the same as Megatron's schedules drive them: wrapped for data parallelism, or bare.
    """

    parts: list[AnyTower]
    chunks: list[nn.Module]

    @property
    def tail(self) -> AnyTower | None:
        """The chunk that makes the output, on the last pipeline stage."""
        return self.parts[-1] if self.parts[-1].last else None


def shard(build: Callable[[int], AnyTower], parallel: ParallelConfig, device: torch.device) -> ShardedTower[AnyTower]:
    """Build this rank's chunks of a tower.

    Args:
        build: makes a chunk, given its number.
        parallel: how the tower is split.
        device: where it lives.
    """
    parts = [build(number).to(device) for number in range(parallel.virtual_pipeline)]
    return ShardedTower(parts, list(parts))


def data_parallel(
    tower: ShardedTower[AnyTower], parallel: ParallelConfig, precision: PrecisionConfig
) -> ShardedTower[AnyTower]:
    """Wrap a tower for data parallelism: gradients in one buffer, averaged over the data-parallel group."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=precision.gradients == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather,  # `ask_for_weights` asks for all
        fp8_param_gather=precision.fp8_primary_weights,
    )
    for part in tower.parts:
        engine.forget_first_values(part)
    # Later chunks reduce in one bucket: there is enough of a backward pass left to hide it behind.
    chunks = [
        DistributedDataParallel(part.config, settings, part, disable_bucketing=number > 0)
        for number, part in enumerate(tower.parts)
    ]
    driver = tower.parts[0].config
    driver.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        driver.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return ShardedTower(tower.parts, list(chunks))


def ask_for_weights(tower: ShardedTower[AnyTower]) -> None:
    """Begin to gather updated weights, those first that are used first, where nobody has begun yet."""
    for chunk in tower.chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            for bucket in reversed(chunk.bucket_groups):
                if not bucket.param_gather_dispatched:
                    bucket.start_param_sync()
