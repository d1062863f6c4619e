import gc

import psutil
import torch
import torch.distributed as dist

from w2s.config.sections import ParallelConfig
from w2s.megatron import compat, groups


def left_by_a_split() -> tuple[int, int]:
    """Process groups and threads of this process after the ranks were split once more."""
    with groups.split(ParallelConfig(), torch.device("cpu")):
        assert len(compat.process_groups()) > 10
    gc.collect()
    return len(compat.process_groups()), psutil.Process().num_threads()


def test_a_split_leaves_no_groups_and_no_threads() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (one, threads), (two, threads_again) = left_by_a_split(), left_by_a_split()
    finally:
        dist.destroy_process_group()
    assert one == two == 1
    assert threads_again <= threads  # each group has three, some fifty in all
