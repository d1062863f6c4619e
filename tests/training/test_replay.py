"""What follows from a step that is repeated."""

import math

import pytest

from w2s.training.replay import Participant, diagnose

NAN = math.nan
RANKS = [Participant(rank, rank, f"node-{rank}", [f"a{rank}", f"b{rank}"]) for rank in range(4)]


@pytest.mark.parametrize(
    ("same", "swapped", "says"),
    [
        ([1, NAN, 1, 1], [1, NAN, 1, 1], "the device of rank 1 on node-1"),
        ([1, 300, 1, 2], [2, 300, 1, 1], "the device of rank 1 on node-1"),
        (
            [1, NAN, 1, 1],
            [1, 1, NAN, 1],
            "the data of rank 1 on node-1, as another rank fails with them: a1, b1",
        ),
        ([1, 1, 1, 40], [40, 1, 1, 1], "the data of rank 3"),
        ([1, NAN, 1, 1], [1, 1, 1, 1], "not reproducible on rank 1"),
        ([1, 2, 1, 1], [9, 1, 1, 1], "not reproducible (no rank fails again"),
        ([NAN] * 4, [NAN] * 4, "a fault of the weights: every rank fails with every sample"),
        ([NAN, 1, NAN, 1], [NAN, 1, 1, NAN], "the device of rank 0 on node-0"),
        ([NAN, 1, NAN, 1], [NAN, 1, 1, NAN], "; a fault of the data of rank 2 on node-2"),
    ],
)
def test_what_follows(same: list[float], swapped: list[float], says: str) -> None:
    found = diagnose(same, swapped, RANKS)
    assert says in found.words
    assert found.passing == ("no rank fails again" in says)


def test_one_data_parallel_rank_cannot_be_compared() -> None:
    assert diagnose([NAN], None, RANKS[:1]).words.startswith("reproducible, and there is no other data-parallel rank")
    assert diagnose([1.0], None, RANKS[:1]).words.startswith("not reproducible")


def test_all_ranks_of_a_replica_are_named() -> None:
    ranks = [Participant(rank // 2, rank, "node-0", [f"a{rank}"]) for rank in range(4)]
    assert "the device of ranks [2, 3] on node-0" in diagnose([1, NAN], [1, NAN], ranks).words
