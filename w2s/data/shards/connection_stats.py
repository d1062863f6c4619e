"""What the reading threads of a process and its source have to do with each other: patience, and what came of it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from w2s.data.shards.bad import Skipped

TIMEOUT = 30.0
"""Seconds in which a connection has to give something, where no configuration says it."""
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 15.0)
"""Seconds to wait before each new try while nothing comes: a server may be away for a minute."""


@dataclass
class Traffic:
    """What came from a source."""

    bytes: int = 0
    """Of samples."""
    waited: float = 0.0
    """Seconds in which a reading process had nothing to do but to wait for a sample."""
    broken: list[Skipped] = field(default_factory=list)
    """Connections that were opened again: the place, the shard, and why."""


class SourceConnection:
    """Patience with a source, and its traffic; many threads use it.

    Args:
        timeout: seconds after which a connection that gives nothing is opened again.
        waits: seconds to wait before each new try while nothing comes.

    Attributes:
        closed: set when nobody wants anything of the source any more.
    """

    def __init__(self, timeout: float = TIMEOUT, waits: Sequence[float] = WAITS) -> None:
        self.timeout, self.waits = timeout, waits
        self.closed = threading.Event()
        self._traffic, self._lock = Traffic(), threading.Lock()

    def pause(self, seconds: float) -> None:
        """Let a server be for a while, or until the link is closed."""
        self.closed.wait(seconds)

    def came(self, size: int) -> None:
        """Note a sample of so many bytes."""
        with self._lock:
            self._traffic.bytes += size

    def waited(self, seconds: float) -> None:
        """Note that a sample was waited for."""
        with self._lock:
            self._traffic.waited += seconds

    def broke(self, place: str, shard: str, reason: str) -> None:
        """Note a connection that has to be opened again."""
        with self._lock:
            self._traffic.broken.append(Skipped(place, shard, reason))

    def take(self) -> Traffic:
        """Return the traffic since the last call."""
        with self._lock:
            traffic, self._traffic = self._traffic, Traffic()
        return traffic
