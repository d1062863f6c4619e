"""The rule by which a run is ended, and who is named."""

from dataclasses import replace

import pytest

from w2s.liveness.verdict import STOP_SECONDS, Row, Verdict, culprit, message, stands_still


def row(rank: int, place: int, age: float, limit: float = 100, **about: object) -> Row:
    return Row(rank=rank, host="node", pid=40 + rank, place=place, age=age, limit=limit, **about)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "ended"),
    [
        ([row(0, 7, 99)], False),
        ([row(0, 7, 101)], True),
        ([row(0, 7, 101), row(1, 7, 5)], False),  # the other one still works on what rank 0 waits for
        ([row(0, 8, 101), row(1, 7, 5)], False),
        ([row(0, 8, 5), row(1, 7, 101)], True),  # the one that is behind is the measure
        ([row(0, 8, 101), row(1, 7, 101, limit=900)], False),  # it evaluates
        ([row(0, 7, 101), row(1, 7, 102)], True),
        ([row(0, 7, 5, limit=900), row(1, 9, 101, condition="stopped")], True),  # it will hold the others up
        ([row(0, 7, 5, limit=900), row(1, 9, 101, condition="lost")], False),  # it may be the network alone
    ],
)
def test_the_ranks_that_are_furthest_behind_decide(rows: list[Row], ended: bool) -> None:
    assert stands_still(rows) is ended


def test_a_run_that_was_asked_to_stop_waits_for_no_helper_that_does_nothing() -> None:
    waiting, training = row(0, 7, STOP_SECONDS + 1, awaits="reading process"), row(0, 7, STOP_SECONDS + 1)
    assert not stands_still([waiting])
    assert stands_still([replace(waiting, signal=15)])
    assert stands_still([waiting, replace(waiting, rank=1, signal=15)])
    assert not stands_still([replace(training, signal=15)]), "a long step is let go on, and saved"


def test_who_holds_the_others_up() -> None:
    waits = row(0, 7, 120, in_collective=True)
    hangs, behind = row(1, 7, 110), row(2, 6, 110, in_collective=True)
    helped = row(3, 8, 105, helpers="reading process 9 gives no sign of life")
    stopped = row(4, 9, 101, condition="stopped")
    assert culprit([waits, hangs]) == hangs
    assert culprit([waits, hangs, behind]) == behind
    assert culprit([waits, hangs, behind, helped]) == helped
    assert culprit([waits, hangs, behind, helped, stopped]) == stopped


def test_the_line() -> None:
    found = row(3, 7, 612.4, step=118, doing="training", condition="stopped")
    assert message(found, 0, "runs/a/stacks.txt") == (
        "rank 3 on node (process 43) has stood still for 612 s at step 118, training: it is stopped by a signal "
        "(SIGSTOP) and does not answer: repeat the command to go on from the last checkpoint; stacks of all ranks are "
        "in runs/a/stacks.txt"
    )
    waits = row(0, 7, 21, step=5, doing="waiting for samples", helpers="reading process 9 is stopped")
    assert message(waits, 15, "") == (
        "stopped by SIGTERM, nothing new was saved, as rank 0 on node (process 40) has stood still for 21 s at step 5, "
        "waiting for samples: reading process 9 is stopped: repeat the command to go on from the last checkpoint"
    )
    assert (Verdict(by=0, message="", signal=15).exit_code, Verdict(by=0, message="", signal=0).exit_code) == (143, 1)
