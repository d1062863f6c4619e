"""Files wherever they are: local, behind a URL (through fsspec), or the output of a shell command."""

import glob
import io
import resource
from collections.abc import Iterable, Sequence
from typing import IO, Any

import fsspec

from w2s.data.shards.connection_stats import SourceConnection
from w2s.data.shards.connections import PIPE, WEB
from w2s.data.shards.reconnecting_file import ReconnectingFile
from w2s.errors import DataError, MissingPackageError

EXTENSIONS = (".tar", ".parquet")
"""Of files that are shards; beside tar files parquet files are lists."""
UNPACK = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "zstd -d --rm",
}
"""What unpacks a compressed tar file, by its extension."""

_BUFFER = 1 << 17
"""Bytes that files are read by: threads hand Python's lock on at each read."""


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


def find_remote(urls: Sequence[str], option: str) -> list[str]:
    """List what URLs name: a file as it stands, the shards of a folder (a URL that ends in `/`), those of a glob.

    Args:
        urls: of one pattern, so that all are of one kind.
        option: the configuration key to name in an error.

    Raises:
        DataError: nothing is there, or fsspec does not know this kind of URL.
        MissingPackageError: fsspec's driver for it is not installed.
    """
    if not urls[0].startswith(WEB):
        _filesystem(urls[0], option)
    return [shard for url in urls for shard in (_glob(url, option) if _has_magic(url) else [url])]


def first_kind(paths: Iterable[str]) -> list[str]:
    """Return those of a folder's files that are its shards: the tar files or, where none is, the parquet files.

    Where that is not either, those that are tar files once they are unpacked.
    """
    files = list(paths)
    return next(filter(None, ([path for path in files if path.endswith(kind)] for kind in (*EXTENSIONS, *UNPACK))), [])


def _has_magic(url: str) -> bool:
    if not (url.endswith("/") or "*" in url or "?" in url or "[" in url):  # as of most of a million
        return False
    # What follows the question mark of a web address is not a glob.
    place = url.partition("?")[0] if url.startswith(WEB) else url
    return place.endswith("/") or glob.has_magic(place)


def _glob(url: str, option: str) -> list[str]:
    filesystem = _filesystem(url, option)
    try:
        paths = first_kind(filesystem.glob(f"{url}*")) if url.endswith("/") else filesystem.glob(url)
    except Exception as error:  # each driver raises errors of its own kind
        raise DataError(f"{option}={url} cannot be listed: {type(error).__name__} {error}") from error
    if not paths:
        raise DataError(f"{option}={url} has no shards: no {' or '.join(EXTENSIONS)} file is there")
    return [filesystem.unstrip_protocol(path) for path in paths]


def _filesystem(url: str, option: str) -> Any:
    try:
        filesystem, _ = fsspec.url_to_fs(url)
    except ImportError as error:
        raise MissingPackageError(f"{option}={url}: {error}") from error
    except (ValueError, OSError) as error:  # an unknown kind of URL, or a driver that lacks a library or a server
        reason = str(error).partition("\n")[0]
        raise DataError(f"{option}={url} cannot be opened: {reason}") from error
    return filesystem


def allow_many_files() -> None:
    """Let this process open as many files as the machine allows: every lane keeps its shards open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
