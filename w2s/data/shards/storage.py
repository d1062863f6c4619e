"""Opening a file wherever it lies: local, behind a URL, or the output of a shell command.

What is not local is one unbroken stream: a connection that breaks, or gives nothing, is opened again at the same byte.
"""

import io
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

from w2s.data.shards.connections import PIPE, Connection, Refusal, connect
from w2s.data.shards.raw_sample import Skipped

TIMEOUT = 30.0
"""Seconds in which a connection has to give something, where no configuration says it."""
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0, 15.0)
"""Seconds to wait before each new try while nothing comes: a server may be away for a minute."""

_BUFFER = 1 << 17
"""Bytes that files are read by: threads hand Python's lock on at each read."""

T = TypeVar("T")


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
        """Let a server be for a while, or until nobody wants anything of it."""
        self.closed.wait(seconds)

    def note(self, *, size: int = 0, waited: float = 0.0, broken: Sequence[Skipped] = ()) -> None:
        """Note bytes of a sample, seconds of waiting for one, or a connection that has to be opened again."""
        with self._lock:
            self._traffic.bytes += size
            self._traffic.waited += waited
            self._traffic.broken += broken

    def take(self) -> Traffic:
        """Return the traffic since the last call."""
        with self._lock:
            traffic, self._traffic = self._traffic, Traffic()
        return traffic


def is_local(shard: str) -> bool:
    """Whether a shard or pattern is a file of this machine."""
    return not shard.startswith(PIPE) and ("://" not in shard or shard.startswith("file://"))


def open_at(shard: str, start: int, link: SourceConnection) -> IO[bytes]:
    """Open a file for reading from byte `start` on; it can seek.

    Raises:
        FileNotFoundError: there is no such file; of one that is not local, the first read tells.
    """
    if is_local(shard):
        stream: IO[bytes] = open(shard.removeprefix("file://"), "rb", _BUFFER)  # noqa: SIM115, the caller closes it
    else:
        stream = io.BufferedReader(ReconnectingFile(shard, link), _BUFFER)
    stream.seek(start)
    return stream


def read_text(path: str) -> str | None:
    """Return the content of a small file; None where it is not there or cannot be read.

    Of a shard that is the output of a command, no neighbour's name can be made: it would be another command.
    """
    if path.startswith(PIPE):
        return None
    try:
        with open_at(path, 0, SourceConnection(waits=())) as stream:
            return stream.read().decode("utf-8")
    except Exception:  # each driver raises errors of its own kind; such a file is a courtesy
        return None


class ReconnectingFile(io.RawIOBase):
    """A file that is not local. New tries follow at once as long as something comes, otherwise after the link's waits.

    Going back in a command's output runs it again.

    Args:
        shard: URL or command.
        link: patience, and where broken connections are noted.
    """

    def __init__(self, shard: str, link: SourceConnection) -> None:
        super().__init__()
        self._shard, self._link = shard, link
        self._position = self._reached = 0
        self._connection: Connection | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        if whence == io.SEEK_END:
            offset += self._whole_size()
        elif whence == io.SEEK_CUR:
            offset += self._position
        self._position = offset  # the next read goes there
        return offset

    def readinto(self, buffer: Any) -> int:
        """Read at least a byte, if the file has one more.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the last try has failed too.
        """
        room = memoryview(buffer)
        data = self._patiently(lambda connection: self._read(connection, len(room)))
        room[: len(data)] = data
        self._position = self._reached = self._position + len(data)
        return len(data)

    def close(self) -> None:
        """End the connection."""
        self._disconnect()
        super().close()

    def _read(self, connection: Connection, size: int) -> bytes:
        data = connection.read(size)
        if not data and connection.size is not None and self._position < connection.size:
            raise ConnectionError
        return data

    def _patiently(self, ask: Callable[[Connection], T]) -> T:
        """Return what is asked of the connection, or of the ones after it."""
        waits, began = iter(self._link.waits), time.monotonic()
        while True:
            proven = self._connection is not None
            try:
                return ask(self._connected())
            except (FileNotFoundError, PermissionError, ImportError, EOFError):
                raise
            except Exception as error:  # each driver raises errors of its own kind
                self._disconnect()
                self._link.note(broken=[Skipped(f"byte {self._position}", self._shard, _reason(error, proven))])
                if proven:
                    continue
                wait = next(waits, None)
                spent = time.monotonic() - began > sum(self._link.waits)  # in tries that gave nothing
                if wait is None or spent or self._link.closed.is_set():
                    raise OSError(f"{self._shard}: {error!r}") from error
                self._link.pause(wait)

    def _connected(self) -> Connection:
        """Return the connection, or a new one, at the byte that is read next."""
        connection, further = self._connection, self._position - self._reached
        if connection is None or (further and not connection.skip(further)):
            self._disconnect()
            connection = self._connection = connect(self._shard, self._position, self._link.timeout)
        self._reached = self._position
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _whole_size(self) -> int:
        size = self._patiently(lambda connection: connection.size)
        if size is None:
            raise OSError(f"{self._shard} has no known end")
        return size


def _reason(error: Exception, proven: bool) -> str:
    if isinstance(error, TimeoutError):
        return "connection stalled"
    return str(error) if isinstance(error, Refusal) else "connection was cut" if proven else "no connection"
