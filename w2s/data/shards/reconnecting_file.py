"""A file of a server as one unbroken stream."""

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

from w2s.data.shards.connection_stats import SourceConnection
from w2s.data.shards.connections import Connection, Refusal, connect

T = TypeVar("T")


class ReconnectingFile(io.RawIOBase):
    """A file that is not local. A connection that breaks, or gives nothing, is opened again at the same byte.

    New tries follow at once as long as something comes, otherwise after the link's waits.

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
        """It is; going back in a command's output runs it again."""
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
                self._link.broke(f"byte {self._position}", self._shard, _reason(error, proven))
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
