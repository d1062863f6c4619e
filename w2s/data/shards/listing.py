"""Which shards a source names: folders, globs, brace patterns, lists and URLs."""

import glob
import hashlib
import math
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import braceexpand
import fsspec

from w2s.data.shards.connections import PIPE, WEB
from w2s.data.shards.storage import is_local
from w2s.errors import ConfigError, DataError, MissingPackageError
from w2s.redaction import SIGNED, without_url_secrets

EXTENSIONS = (".tar", ".parquet")
"""Of files that are shards; beside tar files parquet files are lists."""
MAX_SHARDS = 2_000_000
"""Shards of one pattern."""

_UNPACK = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "zstd -d --rm",
}
"""What unpacks a compressed tar file, by its extension."""
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def split_sources(text: str, option: str = "data.train") -> list[str]:
    """Split a configuration value into its sources at `::` and `;`.

    Raises:
        DataError: a source is empty.
    """
    parts = [part.strip() for part in re.split("::|;", text)]
    if not all(parts):
        raise DataError(f"{option}='{text}' names no shards: give a folder, a glob or a brace pattern")
    return parts


def list_shards(source: str, option: str = "data.train", *, allow_pipe: bool = False) -> list[str]:
    """List the shards of all sources of a configuration value, sorted.

    Args:
        source: a folder (its `.tar` files, or the `.parquet` files of one that has none), a file, a glob, a brace
            pattern such as `a/{000..015}.tar`, a URL of any of these that fsspec has a driver for, a `.txt` file with
            one of these a line, or `pipe:COMMAND`. `,`, `::` and `;` join several.
        option: the configuration key to name in an error.
        allow_pipe: run shell commands that the source names.

    Raises:
        ConfigError: a shell command that is not allowed.
        DataError: nothing is named, or what is named does not exist.
        MissingPackageError: the driver for a kind of URL is not installed.
    """
    patterns = [pattern for part in split_sources(source, option) for pattern in _split_list(part)]
    expanded = [_expand(pattern, option, allow_pipe) for pattern in patterns]
    for shards in expanded:
        _refuse_compressed(shards[0], option)
    return sorted(chain.from_iterable(expanded))


def shards_digest(shards: Sequence[str]) -> str:
    """Return 12 hexadecimal digits over the names of shards and, where they are local files, their sizes in bytes."""
    sizes = {shard_name(shard): Path(shard).stat().st_size if is_local(shard) else 0 for shard in shards}
    return hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:12]


def names_digest(shards: Sequence[str]) -> str:
    """Return 12 hexadecimal digits over the names of shards, in their order."""
    names = "\n".join(map(shard_name, shards))
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def shard_name(shard: str) -> str:
    """Return a shard's name without its folder, and without what a URL is signed with."""
    return without_secrets(shard).removesuffix(SIGNED).rpartition("/")[2]


def shard_folder(shard: str) -> str:
    """Return the folder of a shard with the slash behind it, so that a name can follow."""
    return shard[: len(shard) - len(shard_name(shard))]


def is_parquet(shard: str) -> bool:
    """Whether a shard is a parquet file, by its name."""
    return shard_name(shard).lower().endswith(".parquet")


def without_secrets(shard: str) -> str:
    """Return a shard's path, or its URL or command without the secrets in it."""
    # Of a million names hardly any has one.
    suspect = "@" in shard or "?" in shard or "&" in shard or shard.startswith(PIPE)
    return without_url_secrets(shard) if suspect and not is_local(shard) else shard


def _split_list(part: str) -> list[str]:
    """Split at commas outside of braces; a shell command is left whole."""
    if part.startswith(PIPE):
        return [part]
    return [entry.strip() for entry in re.split(r",(?![^{]*\})", part) if entry.strip()]


def _expand(pattern: str, option: str, allow_pipe: bool) -> list[str]:
    if pattern.startswith(PIPE) and not allow_pipe:
        raise ConfigError(f"{option}={pattern} runs a shell command: set data.allow_pipe=true if you trust it")
    if pattern.startswith(PIPE) and ".parquet" in pattern:
        raise ConfigError(f"{option}={pattern} is a stream, and parquet files are read from their ends: name the file")
    try:
        _check_count(pattern, option)
        names = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{option}: the braces of '{pattern}' do not match ({error})") from error
    if pattern.startswith(PIPE):
        return names
    if not is_local(pattern):
        return _remote(names, option)
    if pattern.endswith(".txt"):
        return _read_list(pattern, option, allow_pipe)
    return _local(pattern, names, option)


def _refuse_compressed(shard: str, option: str) -> None:
    suffix = next((suffix for suffix in _UNPACK if shard.lower().endswith(suffix)), "")
    if suffix and not shard.startswith(PIPE):
        raise DataError(
            f"{option}: {shard} is compressed, so that no run could continue in the middle of it, and images hardly "
            f"shrink: unpack with {_UNPACK[suffix]} *{suffix} and name the .tar files"
        )


def _check_count(pattern: str, option: str) -> None:
    """Refuse braces that stand for more shards than anybody has, before they take memory."""
    ranges = [(int(first), int(last), int(step or 1) or 1) for first, last, step in _RANGE.findall(pattern)]
    count = math.prod(abs(last - first) // abs(step) + 1 for first, last, step in ranges)
    choices: list[int] = []
    for character in pattern:
        if character == "{":
            choices.append(1)
        elif character == "," and choices:
            choices[-1] += 1
        elif character == "}" and choices:
            count *= choices.pop()
    if count > MAX_SHARDS:
        raise DataError(f"{option}={pattern[:80]} stands for more than {MAX_SHARDS:,} shards: name fewer")


def _read_list(pattern: str, option: str, allow_pipe: bool) -> list[str]:
    try:
        lines = Path(pattern.removeprefix("file://")).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option}={pattern} cannot be read: {error}") from error
    shards = [shard for line in lines if line.strip() for shard in _expand(line.strip(), option, allow_pipe)]
    if not shards:
        raise DataError(f"{option}={pattern} has no shards: it has no line with one")
    return shards


def _local(pattern: str, names: list[str], option: str) -> list[str]:
    paths = [path for entry in names for path in _find(os.path.expanduser(entry.removeprefix("file://")))]
    # Folders are listed: a million files are not asked for one by one.
    files = {folder: _files(folder) for folder in {os.path.dirname(path) for path in paths}}
    missing = [path for path in paths if os.path.basename(path) not in files[os.path.dirname(path)]]
    if missing and len(names) == 1:
        raise DataError(f"{option}={pattern} does not exist: check the path")
    if missing:
        raise DataError(
            f"{option}: {len(missing)} of the {len(names)} shards of '{pattern}' are missing, the first is {missing[0]}"
        )
    if not paths:
        raise DataError(f"{option}={pattern} has no shards: no {' or '.join(EXTENSIONS)} file is there")
    return paths


def _find(path: str) -> list[str]:
    """Return the shards of a folder, what a glob finds, or the path as it stands."""
    if glob.has_magic(path):
        return glob.glob(path)
    if path.endswith(".tar") or not os.path.isdir(path):
        return [path]
    return _first_kind(os.path.join(path, name) for name in os.listdir(path))


def _files(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _remote(urls: Sequence[str], option: str) -> list[str]:
    """What URLs of one kind name: a file as it stands, the shards of a folder (a URL that ends in `/`), a glob's."""
    if not urls[0].startswith(WEB):
        _filesystem(urls[0], option)
    return [shard for url in urls for shard in (_glob(url, option) if _has_magic(url) else [url])]


def _has_magic(url: str) -> bool:
    if not (url.endswith("/") or "*" in url or "?" in url or "[" in url):  # as of most of a million
        return False
    # What follows the question mark of a web address is not a glob.
    place = url.partition("?")[0] if url.startswith(WEB) else url
    return place.endswith("/") or glob.has_magic(place)


def _glob(url: str, option: str) -> list[str]:
    filesystem = _filesystem(url, option)
    try:
        paths = _first_kind(filesystem.glob(f"{url}*")) if url.endswith("/") else filesystem.glob(url)
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


def _first_kind(paths: Iterable[str]) -> list[str]:
    """Those of a folder's files that are its shards: the tar files or, where none is, the parquet files.

    Where that is not either, those that are tar files once they are unpacked.
    """
    files = list(paths)
    return next(filter(None, ([path for path in files if path.endswith(kind)] for kind in (*EXTENSIONS, *_UNPACK))), [])
