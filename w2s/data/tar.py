"""The samples of a shard, undecoded: files of a tar archive, those of one sample next to each other."""

import tarfile
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO

from webdataset.tariterators import base_plus_ext

from w2s.data.storage import is_local, open_at
from w2s.errors import DataError

WAITS = (0.5, 2.0, 8.0)
"""Seconds to wait before each new try after an error of a server."""

DONE = -1
"""Place in a shard behind which nothing comes."""

MAX_FILE = 256 << 20
"""Bytes of a file; the sample of a larger one is left out unread."""
_MAX_SIZE = 1 << 50
"""Bytes that no disk has."""
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
_MAX_HEADER = 1 << 20
"""Bytes of a long name or another extended header; a longer one is damage."""


@dataclass(frozen=True)
class RawSample:
    """The files of one sample, or the place where a shard could not be read on."""

    key: str
    shard: str
    files: dict[str, bytes]
    """Contents by lower-case extension."""
    damage: str = ""
    """Why there are no files, or not all; empty for a sound sample."""
    end: int = DONE
    """Byte of the shard at which the next sample begins."""


def read_shard(shard: str, start: int = 0, wanted: Container[str] | None = None) -> Iterator[RawSample]:
    """Yield the samples of a shard in order, undecoded.

    A shard that is damaged, gone or empty ends with a sample that says so, so that the loss is counted and the order
    of all other samples stays what it was. An error of a server is met with new tries, a while apart.

    Args:
        shard: path or URL.
        start: byte at which a sample begins, as in `RawSample.end`.
        wanted: extensions that are read; None reads all.
    """
    count, place, waits = 0, start, iter(() if is_local(shard) else WAITS)
    while place != DONE:
        try:
            for sample in _read_from(shard, place, wanted):
                yield sample
                count, place, waits = count + 1, sample.end, iter(() if is_local(shard) else WAITS)
            break
        except Exception as error:  # tarfile and the drivers of fsspec stumble in many ways
            wait = None if _is_gone(error, shard) else next(waits, None)
            if wait is None:
                yield RawSample(f"sample {count}", shard, {}, damage=_reason(error, shard))
                return
            time.sleep(wait)
    if start == place == 0:
        yield RawSample("sample 0", shard, {}, damage="shard is empty")


def _is_gone(error: Exception, shard: str) -> bool:
    if not isinstance(error, FileNotFoundError):
        return False
    # fsspec's HTTP driver says so of every server error and broken connection; what happened is the cause.
    cause = error.__cause__
    missing = isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)
    return missing or not shard.startswith(("http://", "https://"))


def _reason(error: Exception, shard: str) -> str:
    if _is_gone(error, shard):
        return "shard is gone"
    damaged = isinstance(error, tarfile.TarError | EOFError | ValueError)
    return "shard is damaged" if damaged else "shard cannot be read"


def _read_from(shard: str, start: int, wanted: Container[str] | None) -> Iterator[RawSample]:
    stream, seekable = open_at(shard, start)
    base = 0 if seekable else start
    with closing(stream), _StrictTar.open(fileobj=stream, mode="r:" if seekable else "r|") as tar:
        key, files, damage = "", dict[str, bytes](), ""
        member = tar.first
        while member is not None:
            name, extension = base_plus_ext(member.name) if member.isreg() else ("", "")
            if name:
                if key and name != key:
                    yield RawSample(key, shard, files, damage, end=base + member.offset)
                    files, damage = {}, ""
                key, extension = name, extension.lower()
                if wanted is None or extension in wanted:
                    if member.size <= MAX_FILE:
                        files[extension] = _read(tar, member)
                    else:
                        damage = "file is too large"
            member = tar.next()
        if key:
            yield RawSample(key, shard, files, damage, end=base + tar.offset)


def _read(tar: "_StrictTar", member: tarfile.TarInfo) -> bytes:
    tar.contents.seek(member.offset_data)
    data = tar.contents.read(member.size)
    if len(data) < member.size:
        raise EOFError
    return data


class _StrictHeader(tarfile.TarInfo):
    """A header whose size can be. Python's own reads back and forth for ever where it is negative."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        """Read a header of 512 bytes."""
        header = super().frombuf(buf, encoding, errors)
        if not 0 <= header.size < (_MAX_HEADER if header.type in _EXTENDED else _MAX_SIZE):
            raise tarfile.ReadError(f"a size of {header.size} bytes")
        return header


class _StrictTar(tarfile.TarFile):
    """An archive that ends with its end mark. Python's own takes a broken or missing header for the end."""

    tarinfo = _StrictHeader

    @property
    def first(self) -> tarfile.TarInfo | None:
        """The member that opening the archive has read."""
        return self.firstmember  # type: ignore[attr-defined]

    @property
    def contents(self) -> IO[bytes]:
        """The archive's bytes."""
        return self.fileobj  # type: ignore[return-value]

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; members that went by are not kept."""
        before = self.offset
        self.contents.seek(before)
        try:
            member = self.tarinfo.fromtarfile(self)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        if not 0 <= member.size < _MAX_SIZE or self.offset <= before:  # an extended header can say so too
            raise tarfile.ReadError(f"a size of {member.size} bytes")
        return member


def find_image(files: dict[str, bytes], image_key: str) -> bytes | None:
    """Return the image of a sample: the first of the `;`-separated extensions that is there."""
    return next((files[name] for name in image_key.split(";") if name in files), None)


def caption_file(caption_key: str) -> str:
    """Return the extension of the file that holds a caption: of `json.KEY` it is `json`."""
    return "json" if caption_key.startswith("json.") else caption_key


def check_source(shards: Sequence[str], image_key: str, caption_key: str | None) -> None:
    """Check that shards hold what a stage needs, by the first of them that is sound (of the first three).

    Args:
        shards: the shards of a source; a damaged one among them is skipped in training, and so it is here.
        image_key: extensions of the image, separated by `;`.
        caption_key: where captions are, separated by `;`; None where they are not needed.

    Raises:
        DataError: they are damaged or empty, no sample has an image, or the first one with an image has no caption.
    """
    damages = []
    for shard in shards[:3]:
        try:
            return _check_shard(shard, image_key, caption_key)
        except _Damaged as damage:
            damages.append(damage)
    raise damages[0]


class _Damaged(DataError):
    """A shard that cannot be read from its start."""


def _check_shard(shard: str, image_key: str, caption_key: str | None) -> None:
    extensions: set[str] = set()
    for sample in read_shard(shard):
        if sample.damage:
            raise _Damaged(f"{sample.damage}: replace or remove {shard}")
        extensions |= set(sample.files)
        if find_image(sample.files, image_key) is None:
            continue
        if caption_key is not None and not any(caption_file(key) in sample.files for key in caption_key.split(";")):
            raise DataError(
                f"sample {sample.key} of {shard} has no caption '.{caption_key}', only {_names(extensions)}: "
                "set data.caption_key"
            )
        return
    raise DataError(f"{shard} has no image '.{image_key}', only {_names(extensions)}: set data.image_key")


def _names(extensions: set[str]) -> str:
    return ", ".join(f".{name}" for name in sorted(extensions))
