import gc

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from w2s import compat
from w2s.config.sections import ParallelConfig
from w2s.errors import DataError
from w2s.megatron.parallel import process_groups


def left_by_a_split() -> tuple[int, int]:
    """Process groups and threads of this process after the ranks were split once more."""
    with process_groups.initialize_groups(ParallelConfig(), torch.device("cpu")):
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


def what_rank_0_does() -> tuple[str, int, str]:
    """What `on_main` gives, how often this rank worked for it, and the error that it passes on."""
    calls = []

    def work(result: str) -> str:
        calls.append(result)
        if result == "wrong":
            raise DataError("no shards")
        return result

    with process_groups.initialize_groups(ParallelConfig(), torch.device("cpu")) as ranks:
        found = ranks.on_main(lambda: work("right"))
        with pytest.raises(DataError) as caught:
            ranks.on_main(lambda: work("wrong"))
    return found, len(calls), str(caught.value)


def test_one_rank_works_and_all_have_the_result_or_the_error() -> None:
    assert run_ranks(what_rank_0_does, 2) == [("right", 2, "no shards"), ("right", 0, "no shards")]
