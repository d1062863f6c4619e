"""The rule by which a run is ended, and who is named."""

from dataclasses import replace

import pytest

from w2s.processes.liveness.verdict import STOP_SECONDS, RankStatus, Verdict, first_failed, is_stalled, message


def status(rank: int, place: int, age: float, limit: float = 100, **about: object) -> RankStatus:
    return RankStatus(rank=rank, host="node", pid=40 + rank, place=place, age=age, limit=limit, **about)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statuses", "ended"),
    [
        ([status(0, 7, 99)], False),
        ([status(0, 7, 101)], True),
        ([status(0, 7, 101), status(1, 7, 5)], False),  # the other one still works on what rank 0 waits for
        ([status(0, 8, 101), status(1, 7, 5)], False),
        ([status(0, 8, 5), status(1, 7, 101)], True),  # the one that is behind is the measure
        ([status(0, 8, 101), status(1, 7, 101, limit=900)], False),  # it evaluates
        ([status(0, 7, 101), status(1, 7, 102)], True),
        ([status(0, 7, 5, limit=900), status(1, 9, 101, condition="stopped")], True),  # it will hold the others up
        ([status(0, 7, 5, limit=900), status(1, 9, 101, condition="lost")], False),  # it may be the network alone
    ],
)
def test_the_ranks_that_are_furthest_behind_decide(statuses: list[RankStatus], ended: bool) -> None:
    assert is_stalled(statuses) is ended


def test_a_run_that_was_asked_to_stop_waits_for_no_helper_that_does_nothing() -> None:
    waiting, training = status(0, 7, STOP_SECONDS + 1, awaits="reading process"), status(0, 7, STOP_SECONDS + 1)
    assert not is_stalled([waiting])
    assert is_stalled([replace(waiting, signal=15)])
    assert is_stalled([waiting, replace(waiting, rank=1, signal=15)])
    assert not is_stalled([replace(training, signal=15)]), "a long step is let continue, and saved"


def test_who_holds_the_others_up() -> None:
    waits = status(0, 7, 120, in_collective=True)
    hangs, behind = status(1, 7, 110), status(2, 6, 110, in_collective=True)
    helped = status(3, 8, 105, helpers="reading process 9 gives no sign of life")
    stopped = status(4, 9, 101, condition="stopped")
    assert first_failed([waits, hangs]) == hangs
    assert first_failed([waits, hangs, behind]) == behind
    assert first_failed([waits, hangs, behind, helped]) == helped
    assert first_failed([waits, hangs, behind, helped, stopped]) == stopped


def test_the_line() -> None:
    found = status(3, 7, 612.4, step=118, doing="training", condition="stopped")
    assert message(found, 0, "runs/a/stacks.txt") == (
        "rank 3 on node (process 43) has been stalled for 612 s at step 118, training: it is stopped by a signal "
        "(SIGSTOP) and does not answer: repeat the command to resume from the last checkpoint; stacks of all ranks are "
        "in runs/a/stacks.txt"
    )
    waits = status(0, 7, 21, step=5, doing="waiting for samples", helpers="reading process 9 is stopped")
    assert message(waits, 15, "") == (
        "stopped by SIGTERM, nothing new was saved, as rank 0 on node (process 40) has been stalled for 21 s at step 5"
        ", waiting for samples: reading process 9 is stopped: repeat the command to resume from the last checkpoint"
    )
    assert (Verdict(by=0, message="", signal=15).exit_code, Verdict(by=0, message="", signal=0).exit_code) == (143, 1)
