"""One connection to a file that is not on this machine: a web server's, one of an fsspec driver, a command's output.

Each of them raises what its library raises; `TimeoutError` means that nothing came in time.
"""

import base64
import io
import os
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import IO, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import fsspec

PIPE = "pipe:"
WEB = ("http://", "https://")

_BLOCK = 1 << 20
"""Bytes that are asked for at once."""
_NEAR = 1 << 20
"""Bytes that are sooner read than skipped by a new request."""
_GONE = (404, 410)
_BEHIND_THE_END = 416

T = TypeVar("T")


class Refusal(ConnectionError):
    """What a server or a command has answered instead: a few words, the same for all files."""


class Connection(ABC):
    """A file that is read from a byte on."""

    size: int | None = None
    """Bytes of the whole file, where they are known."""

    @abstractmethod
    def read(self, size: int) -> bytes:
        """Return at least one and at most `size` bytes, or nothing at the end or where the connection was cut."""

    @abstractmethod
    def close(self) -> None:
        """End it."""

    def skip(self, size: int) -> bool:
        """Continue `size` bytes further, or back where it is negative; return whether that needs no new connection."""
        while size > 0:
            block = self.read(min(size, _BLOCK))
            if not block:
                return False
            size -= len(block)
        return size == 0


def connect(shard: str, start: int, timeout: float) -> Connection:
    """Open a file at a byte.

    Args:
        shard: URL or command.
        start: the byte.
        timeout: seconds in which something has to come.

    Raises:
        FileNotFoundError: there is no such file.
        TimeoutError: nothing came.
    """
    if shard.startswith(PIPE):
        return _Command(shard, start, timeout)
    return _Web(shard, start, timeout) if shard.startswith(WEB) else _Driver(shard, start, timeout)


class _Web(Connection):
    """One answer of a web server, as it comes.

    fsspec's driver would fetch whole blocks, of which a cut connection leaves nothing, and all of them through one
    event loop.
    """

    def __init__(self, url: str, start: int, timeout: float) -> None:
        try:
            self._answer = urlopen(_request(url, start), timeout=timeout)
        except HTTPError as error:
            if error.code in _GONE:
                raise FileNotFoundError(url) from error
            if error.code != _BEHIND_THE_END:
                raise Refusal(f"status {error.code}") from error
            self._answer = error  # the byte lies behind the end
            return
        except URLError as error:
            raise error.reason if isinstance(error.reason, OSError) else error from None
        partial = self._answer.status == 206
        if self._answer.length is not None:
            self.size = self._answer.length + (start if partial else 0)
        if not partial:
            super().skip(start)

    def read(self, size: int) -> bytes:
        return cast("bytes", self._answer.read1(size)) if self._answer.status != _BEHIND_THE_END else b""

    def skip(self, size: int) -> bool:
        return size <= _NEAR and super().skip(size)

    def close(self) -> None:
        self._answer.close()


def _request(url: str, start: int) -> Request:
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    plain = urlunsplit(parts._replace(netloc=host, path=quote(parts.path, safe="/%:=&~+!$,;'@()*[]")))
    headers: dict[str, str] = fsspec.config.conf.get(parts.scheme, {}).get("headers", {})
    request = Request(plain, headers={"Range": f"bytes={start}-"})
    if login:
        headers = {"Authorization": f"Basic {base64.b64encode(unquote(login).encode()).decode()}", **headers}
    for name, value in headers.items():  # not for the server that this one sends on to
        request.add_unredirected_header(name, value)
    return request


class _Driver(Connection):
    """A file of one of fsspec's drivers, which fetches it block by block."""

    def __init__(self, url: str, start: int, timeout: float) -> None:
        self._timeout = timeout
        self._file: IO[bytes] = _within(timeout, lambda: fsspec.open(url, "rb", block_size=_BLOCK).open())
        self.size = getattr(self._file, "size", None)
        if start:
            self._file.seek(start)

    def read(self, size: int) -> bytes:
        return _within(self._timeout, lambda: self._file.read(size))

    def skip(self, size: int) -> bool:
        self._file.seek(size, 1)
        return True

    def close(self) -> None:
        self._file.close()


class _Command(Connection):
    """The output of a shell command."""

    def __init__(self, command: str, start: int, timeout: float) -> None:
        self._timeout = timeout
        # A group of its own, so that all that the shell has started can be ended.
        self._process = subprocess.Popen(
            command.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE, start_new_session=True
        )
        self._output = cast("io.BufferedReader", self._process.stdout)
        if not self.skip(start):
            raise EOFError

    def read(self, size: int) -> bytes:
        data = _within(self._timeout, lambda: self._output.read1(size))
        if not data and (status := self._process.wait(self._timeout)):
            raise Refusal(f"exit code {status}")
        return data

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what a call returns, made in a thread that is left behind if it takes longer.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # handed to the caller
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(seconds)
