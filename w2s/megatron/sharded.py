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
from w2s.megatron import engine
from w2s.megatron.fully_sharded import FullySharded
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
    """Wrap a tower for data parallelism: gradients are averaged over the data-parallel group."""
    for part in tower.parts:
        engine.forget_first_values(part)
    full = parallel.shard == "full"
    chunks = _fully_sharded(tower, precision) if full else _optimizer_sharded(tower, parallel, precision)
    driver = tower.parts[0].config
    driver.finalize_model_grads_func = finalize_model_grads
    if full or parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        driver.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return ShardedTower(tower.parts, list(chunks))


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
    return [FullySharded(part, settings) for part in tower.parts]


def _optimizer_sharded(
    tower: ShardedTower[AnyTower], parallel: ParallelConfig, precision: PrecisionConfig
) -> list[Any]:
    """Each rank has whole weights, and whole gradients in one buffer; it updates a share."""
    several = parallel_state.get_data_parallel_world_size() > 1
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=precision.gradients == "fp32",
        overlap_grad_reduce=several and parallel.overlap_grad_reduce,
        overlap_param_gather=several and parallel.overlap_param_gather,
        align_param_gather=several and parallel.overlap_param_gather,  # `ask_for_weights` asks for all
        fp8_param_gather=precision.fp8_primary_weights,
    )
    # After a gather Megatron lays out weights in FP8.
    wrapper = DistributedDataParallel if several or precision.fp8_primary_weights else _Alone
    # Later chunks reduce in one bucket: there is enough of a backward pass left to hide it behind.
    return [
        wrapper(part.config, settings, part, disable_bucketing=number > 0) for number, part in enumerate(tower.parts)
    ]


@contextmanager
def whole(towers: Iterable[ShardedTower[Any]]) -> Iterator[None]:
    """Inside, ranks have the towers' weights whole, between passes too; what is written into them stays."""
    with torch.no_grad(), ExitStack() as stack:
        for tower in towers:
            for chunk in tower.chunks:
                if isinstance(chunk, FullySharded):
                    stack.enter_context(chunk.whole())
        yield


def ask_for_weights(tower: ShardedTower[AnyTower]) -> None:
    """Begin to gather updated weights, those first that are used first, where nobody has begun yet."""
    for chunk in tower.chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            for bucket in reversed(chunk.bucket_groups):
                if not bucket.param_gather_dispatched:
                    bucket.start_param_sync()
