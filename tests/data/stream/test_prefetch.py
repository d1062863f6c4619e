from collections.abc import Generator

import pytest

from w2s.data.stream.prefetch import Prefetcher


class Made:
    """Items of rising size, and how far they were ahead of their use."""

    def __init__(self, count: int) -> None:
        self.count, self.used = count, 0
        self.most = self.most_bytes = 0
        self.ended = False

    def items(self) -> Generator[int, None, None]:
        try:
            for index in range(self.count):
                yield index
                ahead = range(self.used, index + 1)
                self.most = max(self.most, len(ahead))
                self.most_bytes = max(self.most_bytes, sum(ahead))
        finally:
            self.ended = True


def open_ahead(made: Made, most: int, room: float) -> Prefetcher[int]:
    return Prefetcher(made.items(), size=lambda item: item, most=most, room=room, waited=lambda _: None)


def test_items_come_in_order_and_no_more_ahead_than_asked() -> None:
    made = Made(2000)
    ahead = open_ahead(made, most=8, room=float("inf"))
    for index in range(2000):
        assert ahead.next() == index
        made.used = index + 1
    # One more may be in use when the next is made.
    assert 2 <= made.most <= 8 + 1


def test_no_more_bytes_are_held_than_there_is_room_for() -> None:
    made = Made(2000)
    ahead = open_ahead(made, most=10**9, room=10_000)
    for index in range(2000):
        assert ahead.next() == index
        made.used = index + 1
    # The last item held may go beyond, and one may be in use.
    assert made.most_bytes <= 10_000 + 2 * 2000


def test_without_room_one_item_is_held() -> None:
    made = Made(50)
    ahead = open_ahead(made, most=100, room=0)
    assert [ahead.next() for _ in range(50)] == list(range(50))


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise KeyError("planted")

    ahead = Prefetcher(items(), size=lambda _: 1, most=5, room=5, waited=lambda _: None)
    assert ahead.next() == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="planted"):
            ahead.next()
