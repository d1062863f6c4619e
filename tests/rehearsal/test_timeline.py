"""When things would happen, by tapes written by hand."""

import pytest

from w2s.planning.time.cards import card
from w2s.planning.time.roofline import exchange, message
from w2s.rehearsal.tape import Call, Compute, Event, Group, Tape, Wait
from w2s.rehearsal.timeline import GPU_LANE, play

H100 = card("h100")
PAIR = Group("data parallel", (0, 1), on_gpu=True)
BYTES = 10**9
GATHER = exchange(H100, BYTES, 2, 1)


def gather(number: int, size: int = BYTES) -> Call:
    return Call(number, "all_gather", 0, ("bfloat16[1]",), size, "a.py:1", "forward")


def tape(rank: int, *events: Event, group: Group = PAIR) -> Tape:
    return Tape(rank, {0: group}, list(events), [0])


def work(seconds: float, part: str = "forward") -> Compute:
    return Compute(part, seconds)


def test_a_call_that_is_waited_for_at_once_is_exposed() -> None:
    alone = [gather(0), Wait(0, "a.py:2"), work(1.0)]
    line = play([tape(0, *alone), tape(1, *alone)], H100)
    assert line.steps == [pytest.approx(GATHER + 1)]
    assert line.spent == {("data parallel", 2, "all_gather"): (pytest.approx(GATHER), pytest.approx(GATHER))}


def test_a_call_behind_work_is_not() -> None:
    hidden = [gather(0), work(1.0), Wait(0, "a.py:2")]
    line = play([tape(0, *hidden), tape(1, *hidden)], H100)
    assert line.steps == [pytest.approx(1)]
    assert line.spent["data parallel", 2, "all_gather"] == (pytest.approx(GATHER), 0.0)


def test_a_call_begins_with_the_last_rank_and_after_the_one_before() -> None:
    early = [gather(0), gather(1), Wait(0, "a.py:2"), Wait(1, "a.py:3")]
    line = play([tape(0, *early), tape(1, work(0.5), *early)], H100)
    assert line.steps == [pytest.approx(0.5 + 2 * GATHER)]
    spans = [(span.begin, span.end) for span in line.spans if span.rank == 0 and span.lane == "data parallel"]
    assert spans == [pytest.approx((0.5, 0.5 + GATHER)), pytest.approx((0.5 + GATHER, 0.5 + 2 * GATHER))]
    assert [span.lane for span in line.spans if span.rank == 1].count(GPU_LANE) == 1


def test_messages_in_both_directions_go_at_once() -> None:
    group, size = Group("pipeline", (0, 8), on_gpu=True), BYTES

    def ends(rank: int) -> Tape:
        peer = 8 - rank
        calls = [
            Call(number, kind, 0, ("x",), size, "a.py:1", "forward", peer=peer)
            for number, kind in enumerate(("send", "receive") if rank == 0 else ("receive", "send"))
        ]
        return tape(rank, *calls, Wait(0, ""), Wait(1, ""), group=group)

    line = play([ends(0), ends(8)], H100)
    assert line.steps == [pytest.approx(message(H100, size, 8))]


def test_ranks_that_are_not_rehearsed_are_in_time() -> None:
    line = play([tape(0, work(1.0), gather(0), Wait(0, ""))], H100)
    assert line.steps == [pytest.approx(1 + GATHER)] and not line.stuck


def test_steps_are_told_apart_and_the_slowest_rank_counts() -> None:
    tapes = [tape(0, work(1.0, "a"), work(2.0, "b")), tape(1, work(3.0, "a"), work(1.0, "b"))]
    for each in tapes:
        each.steps = [0, 1]
    assert play(tapes, H100).steps == [3.0, 2.0]


def test_ranks_that_wait_for_calls_of_each_other_are_stuck() -> None:
    """They agree in each group, but not in the order of the groups."""
    groups = {0: PAIR, 1: Group("tensor", (0, 1), on_gpu=True)}

    def crossed(rank: int) -> Tape:
        order = (rank, 1 - rank)
        events: list[Event] = []
        for number, group in enumerate(order):
            events += [
                Call(number, "all_reduce", group, ("x",), 1, f"{group}.py:1", "forward"),
                Wait(number, f"{group}.py:2"),
            ]
        return Tape(rank, groups, events, [0])

    assert play([crossed(0), crossed(1)], H100).stuck == [
        "rank 0 waits for ever at 0.py:2",
        "rank 1 waits for ever at 1.py:2",
    ]
