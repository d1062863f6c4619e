"""Reading ahead: a thread takes what an iterator gives before it is asked for."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """What a generator gives, in its order, fetched by a thread of its own.

    Args:
        items: what is read. Its errors come where its next item would.
        size: bytes of an item.
        most: items that are held ahead of use.
        room: bytes that they may have; one item is held whatever it has.
        waited: is told the seconds whenever an item had to be waited for.
    """

    def __init__(
        self,
        items: Generator[T, None, None],
        *,
        size: Callable[[T], int],
        most: int,
        room: float,
        waited: Callable[[float], None],
    ) -> None:
        self._items, self._size, self._waited = items, size, waited
        self._most, self._room = most, room
        self._held: deque[T] = deque()
        self._bytes = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        threading.Thread(target=self._fetch, daemon=True).start()

    def next(self) -> T:
        """Return the next item, which is waited for if need be."""
        with self._changed:
            if not self._held:
                self._wait()
            item = self._held.popleft()
            self._bytes -= self._size(item)
            # The thread sleeps until there is something to do for it.
            if 2 * len(self._held) <= self._most and 2 * self._bytes <= self._room:
                self._changed.notify()
            return item

    def close(self) -> None:
        """Let the thread end as soon as nothing holds it."""
        with self._changed:
            self._closed = True
            self._held.clear()
            self._changed.notify()

    def _wait(self) -> None:
        began = time.perf_counter()
        while not self._held:
            if self._error is not None:
                raise self._error
            self._changed.wait()
        self._waited(time.perf_counter() - began)

    def _fetch(self) -> None:
        try:
            for item in self._items:
                if not self._keep(item):
                    return
        except BaseException as error:  # handed to the reader
            with self._changed:
                self._error = error
                self._changed.notify()
        finally:
            self._items.close()

    def _keep(self, item: T) -> bool:
        """Hold an item, wait until there is room for the next one, and return whether it is wanted."""
        with self._changed:
            self._held.append(item)
            self._bytes += self._size(item)
            self._changed.notify()
            while not self._closed and (len(self._held) >= self._most or (self._held and self._bytes >= self._room)):
                self._changed.wait()
            return not self._closed
