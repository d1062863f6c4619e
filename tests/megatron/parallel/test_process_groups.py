import gc

import psutil
import pytest
import torch

from tests.distributed import run_ranks
from w2s import compat
from w2s.config.sections import ParallelConfig
from w2s.errors import DataError
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks


def left_by_a_split() -> tuple[int, int]:
    """Process groups and threads of this process after the ranks were split once more."""
    with process_groups.initialize_groups(ParallelConfig(), torch.device("cpu")):
        assert len(compat.process_groups()) > 10
    gc.collect()
    return len(compat.process_groups()), psutil.Process().num_threads()


def left_by_two_splits() -> list[tuple[int, int]]:
    return [left_by_a_split(), left_by_a_split()]


def test_a_split_leaves_no_groups_and_no_threads() -> None:
    for (one, threads), (two, threads_again) in run_ranks(left_by_two_splits, 2):
        assert one == two == 1
        assert threads_again <= threads  # each group has three, some fifty in all


def test_alone_all_groups_are_one(alone: Ranks) -> None:
    assert compat.process_groups() == [alone.world_group]
    assert alone.data_group is alone.model_group is alone.self_group is alone.control_group is alone.world_group


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
