"""What a rank holds of a tower: the chunks of its pipeline stage, wrapped for data parallelism for training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import nn

from w2s.config.sections import ParallelConfig, PrecisionConfig
from w2s.megatron.compat import accumulate_in_products
from w2s.megatron.fp8 import transformer_engine
from w2s.megatron.model.tower import Tower
from w2s.megatron.parallel.fully_sharded import FullySharded

AnyTower = TypeVar("AnyTower", bound=Tower)


@dataclass(frozen=True)
class ShardedTower(Generic[AnyTower]):
    """A tower split over tensor- and pipeline-parallel ranks.

    Attributes:
        chunks: this rank's chunks, in the order of their layers; more than one with a virtual pipeline.
        wrapped: the same as Megatron's schedules drive them: wrapped for data parallelism, or bare.
    """

    chunks: list[AnyTower]
    wrapped: list[nn.Module]

    @property
    def last_chunk(self) -> AnyTower | None:
        """The chunk that makes the output, on the last pipeline stage."""
        return self.chunks[-1] if self.chunks[-1].last else None


def shard(build: Callable[[int], AnyTower], parallel: ParallelConfig, device: torch.device) -> ShardedTower[AnyTower]:
    """Build this rank's chunks of a tower.

    Args:
        build: makes a chunk, given its index.
        parallel: how the tower is split.
        device: where it lives.
    """
    chunks = [build(index).to(device) for index in range(parallel.virtual_pipeline)]
    return ShardedTower(chunks, list(chunks))


def data_parallel(
    tower: ShardedTower[AnyTower], parallel: ParallelConfig, precision: PrecisionConfig
) -> ShardedTower[AnyTower]:
    """Wrap a tower for data parallelism: gradients are averaged over the data-parallel group."""
    for chunk in tower.chunks:
        transformer_engine.clear_high_precision_init(chunk)
    full = parallel.shard == "full"
    wrapped = _fully_sharded(tower, precision) if full else _optimizer_sharded(tower, parallel, precision)
    driver = tower.chunks[0].config
    driver.finalize_model_grads_func = finalize_model_grads
    if full or parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        driver.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return ShardedTower(tower.chunks, list(wrapped))


class _Alone(DistributedDataParallel):
    """Megatron's wrapper for the only replica: gradients and weights are whole, and nothing is exchanged."""

    def start_param_sync(self, *unused: Any, **unused_too: Any) -> None:
        """Gather nothing: this rank updates all weights."""

    def finish_grad_sync(self, *unused: Any, **unused_too: Any) -> None:
        """Reduce nothing: the gradients are the sum over all replicas already."""


def _fully_sharded(tower: ShardedTower[AnyTower], precision: PrecisionConfig) -> list[Any]:
    """Each rank keeps a share of weights and gradients too."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        grad_reduce_in_fp32=precision.gradients == "fp32",
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        gradient_reduce_div_fusion=dist.get_backend() == "nccl",  # a reduction that scales is NCCL's own
    )
    return [FullySharded(chunk, settings) for chunk in tower.chunks]


def _optimizer_sharded(
    tower: ShardedTower[AnyTower], parallel: ParallelConfig, precision: PrecisionConfig
) -> list[Any]:
    """Each rank has whole weights, and whole gradients in one buffer; it updates a share."""
    for chunk in tower.chunks:
        accumulate_in_products(chunk)
    several = parallel_state.get_data_parallel_world_size() > 1
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=precision.gradients == "fp32",
        overlap_grad_reduce=several and parallel.overlap_grad_reduce,
        overlap_param_gather=several and parallel.overlap_param_gather,
        align_param_gather=several and parallel.overlap_param_gather,  # `start_param_gather` asks for all
        fp8_param_gather=precision.fp8_primary_weights,
    )
    # After a gather Megatron lays out weights in FP8.
    wrapper = DistributedDataParallel if several or precision.fp8_primary_weights else _Alone
    # Later chunks reduce in one bucket: enough of the backward pass is left to hide it behind.
    return [
        wrapper(chunk.config, settings, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(tower.chunks)
    ]


@contextmanager
def unsharded(towers: Iterable[ShardedTower[Any]]) -> Iterator[None]:
    """Inside, ranks have the towers' weights whole, between passes too; what is written into them stays."""
    with torch.no_grad(), ExitStack() as stack:
        for tower in towers:
            for wrapped in tower.wrapped:
                if isinstance(wrapped, FullySharded):
                    stack.enter_context(wrapped.unsharded())
        yield


def start_param_gather(tower: ShardedTower[AnyTower]) -> None:
    """Begin to gather updated weights, those first that are used first, where nobody has begun yet."""
    for wrapped in tower.wrapped:
        if isinstance(wrapped, DistributedDataParallel) and wrapped.ddp_config.overlap_param_gather:
            for bucket in reversed(wrapped.bucket_groups):
                if not bucket.param_gather_dispatched:
                    bucket.start_param_sync()
