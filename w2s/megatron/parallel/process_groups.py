"""Process groups: the ranks of a run, and how they are split."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.compat import process_groups, world_group
from w2s.config.sections import HardwareConfig, ParallelConfig
from w2s.errors import W2SError
from w2s.megatron import compat, cpu

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

    rank: int
    """Rank in the world."""
    world_size: int
    """Number of processes."""
    data_rank: int
    """Rank in the data-parallel group."""
    data_size: int
    """Size of the data-parallel group."""
    data_group: ProcessGroup
    """The data-parallel group: ranks that hold the same weights and see different samples."""
    model_rank: int
    """Rank in the model-parallel group."""
    model_size: int
    """Size of the model-parallel group."""
    model_group: ProcessGroup
    """The tensor x pipeline group: ranks that hold one replica of the model together and see the same samples."""
    world_group: ProcessGroup
    """All ranks."""
    self_group: ProcessGroup
    """This rank alone."""
    control_group: ProcessGroup
    """All ranks, over gloo: what is said in it never waits for a GPU."""
    device: torch.device
    """Where the model lives."""

    @property
    def main(self) -> bool:
        """Whether this process speaks for the run (logs, writes files)."""
        return self.rank == 0

    @property
    def data_reader_rank(self) -> int:
        """Which of the `world_size` readers of the data this rank is.

        The ranks of a model-parallel group read the samples of their data-parallel rank together, each its own share.
        """
        return self.data_rank + self.data_size * self.model_rank

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def broadcast(self, value: T) -> T:
        """Return rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Return on every rank what rank 0 gets by some work.

        Raises:
            W2SError: the work does; on every rank.
        """
        outcome: T | W2SError | None = None
        if self.main:
            try:
                outcome = work()
            except W2SError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, W2SError):
            raise outcome
        return cast("T", outcome)

    def gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, in order."""
        return gather(value, self.control_group) if self.world_size > 1 else [value]

    def to_floats(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return this rank's scalars as numbers; waits for a GPU, once."""
        local = [value.detach().double().to(self.device) for value in values.values()]
        return dict(zip(values, torch.stack(local).tolist() if local else [], strict=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.world_size == 1:
            return flag
        highest = torch.tensor([int(flag)])
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(highest.item())


def means(gathered: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each number over the ranks that have it: some only the last pipeline stage has."""
    names = dict.fromkeys(name for each in gathered for name in each)
    return {name: fmean(each[name] for each in gathered if name in each) for name in names}


def sums(gathered: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up each number over the ranks that have it."""
    names = dict.fromkeys(name for each in gathered for name in each)
    return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; 0 and 1 without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """Return the `value` of every rank of a group (None: of all), in order; this one's alone without process groups."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def world_size() -> int:
    """Return the number of ranks that the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(hardware: HardwareConfig) -> torch.device:
    """Return this rank's device: its own GPU, or the CPU."""
    on_gpu = torch.cuda.is_available() and hardware.device != "cpu"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")


@contextmanager
def init_distributed(parallel: ParallelConfig, hardware: HardwareConfig) -> Iterator[Ranks]:
    """Join the process group and Megatron's groups; leave them at the end.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; alone without them.
    """
    device = local_device(hardware)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The watchers (w2s/processes/liveness) are quicker and know who stalls; this is for where there are none.
    timeout = timedelta(seconds=max(hardware.timeout, hardware.slow_timeout))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        with initialize_groups(parallel, device, timeout) as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def initialize_groups(
    parallel: ParallelConfig, device: torch.device, timeout: timedelta = dist.default_pg_timeout
) -> Iterator[Ranks]:
    """Split the ranks of the process group that this process is in as Megatron does; end the groups afterwards.

    Args:
        parallel: how.
        device: where the model lives.
        timeout: after which a rank that waits for another gives up.
    """
    cpu.enable()
    before = process_groups()
    # Alone all groups would be the same, and each over gloo has threads that wake up a hundred times a second.
    alone = dist.get_world_size() == 1 and dist.get_backend() == "gloo"
    control_group: Any = world_group() if alone else dist.new_group(backend="gloo", timeout=timeout)
    with compat.one_group_for_all(control_group) if alone else nullcontext():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
            create_gloo_process_groups=False,
        )
    compat.replace_rng_tracker(cpu.NoRngTracker())
    try:
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            data_group=parallel_state.get_data_parallel_group(),
            model_rank=dist.get_rank(parallel_state.get_model_parallel_group()),
            model_size=dist.get_world_size(parallel_state.get_model_parallel_group()),
            model_group=parallel_state.get_model_parallel_group(),
            world_group=world_group(),
            self_group=parallel_state.get_context_parallel_group(),
            control_group=control_group,
            device=device,
        )
    finally:
        parallel_state.destroy_model_parallel()
        # Megatron only forgets them; over gloo their threads would keep waking up.
        for group in process_groups()[len(before) :]:
            dist.destroy_process_group(group)
