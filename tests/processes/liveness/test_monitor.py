"""Where the watchers of all ranks meet."""

import socket
from pathlib import Path

from w2s.processes.liveness.monitor import LOST_SECONDS, Answer, Hub, Spoke
from w2s.processes.liveness.verdict import RankStatus


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def status(rank: int, age: float, place: int = 3, **about: object) -> RankStatus:
    return RankStatus(
        rank=rank, host=f"node{rank}", pid=40 + rank, place=place, age=age, **{"limit": 60, "lost_limit": 60, **about}
    )  # type: ignore[arg-type]


def test_two_ranks_over_a_socket(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(2, 1800, listener, "secret")
    address = listener.getsockname()
    report = tmp_path / "stacks.txt"
    spoke = Spoke(address, "secret", 1800)
    assert hub.tell(status(0, age=61), "") == Answer(), "rank 1 has never been heard of: nobody knows what it does"
    assert spoke.tell(status(1, age=5), "") == Answer()
    assert hub.tell(status(0, age=62), "") == Answer(), "rank 1 works"
    spoke.tell(status(1, age=61), "")
    assert hub.tell(status(0, age=63, report=str(report)), "") == Answer(asks_for_stack=True)
    assert spoke.tell(status(1, age=62, condition="stopped"), "").asks_for_stack
    ended = hub.tell(status(0, age=64, report=str(report)), "a stack").verdict
    assert ended is not None
    assert ended.message.startswith("rank 1 on node1 (process 41) has been stalled for 62 s starting: it is stopped")
    assert "a stack" in report.read_text()
    assert hub.others()
    assert spoke.tell(status(1, age=63), "").verdict == ended
    assert not hub.others()


def test_a_stranger_is_not_heard() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(2, 1800, listener, "secret")
    stranger = Spoke(listener.getsockname(), "guess", 1800)
    assert stranger.tell(status(1, age=0), "") == Answer()
    assert not hub.others()


def test_a_rank_that_is_not_heard_of_any_more_is_lost_and_one_that_is_done_is_not() -> None:
    clock = Clock()
    hub = Hub(3, 1800, None, "", clock)
    for rank in (1, 2):
        hub._take(status(rank, age=0, place=9 if rank == 2 else 3), "")
    hub.tell(status(0, age=0), "")
    hub.leave(2)
    clock.now = 30
    hub.forgive(30)
    assert hub.tell(status(0, age=0), "") == Answer()
    clock.now = 95
    assert hub.tell(status(0, age=65), "a stack") == Answer()
    ended = hub.tell(status(0, age=65), "a stack").verdict
    assert ended is not None
    assert (
        "rank 1 on node1 (process 41) has been stalled for 65 s starting: its machine does not answer" in ended.message
    )
    assert LOST_SECONDS < 65


def test_a_rank_that_is_lost_where_it_may_take_long_is_no_longer_waited_for_than_another() -> None:
    """Its watcher would beat whatever it does: machine and watcher are gone, or stall."""
    clock = Clock()
    hub = Hub(2, 1800, None, "", clock)
    hub._take(status(1, age=0, limit=1800), "")
    hub.tell(status(0, age=0), "")
    clock.now = 59
    assert hub.tell(status(0, age=59), "") == Answer()
    clock.now = 61
    assert hub.tell(status(0, age=61), "a stack") == Answer()
    ended = hub.tell(status(0, age=61), "a stack").verdict
    assert ended is not None and "rank 1 on node1" in ended.message and "its machine does not answer" in ended.message


def test_without_the_hub_a_watcher_decides_alone() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    hub = Hub(2, 1800, listener, "secret")
    spoke = Spoke(listener.getsockname(), "secret", 1800)
    never = Spoke(("127.0.0.1", 1), "secret", 1800)
    assert never.tell(status(1, age=61), "a stack") == Answer(), "a network may have no way to it"
    hub.tell(status(0, age=0), "")
    assert spoke.tell(status(1, age=0), "") == Answer()
    listener.close()
    spoke._hang_up()
    spoke._address = ("127.0.0.1", 1)
    assert spoke.tell(status(1, age=59), "") == Answer()
    assert spoke.tell(status(1, age=61), "").asks_for_stack
    ended = spoke.tell(status(1, age=62), "a stack").verdict
    assert ended is not None
    assert ended.message.startswith("rank 0 on 127.0.0.1")
    assert ended.by == 1
