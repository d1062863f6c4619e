"""Shards that are tar archives: the files of a sample stand next to each other."""

import tarfile
from collections.abc import Container, Iterator
from typing import IO

from webdataset.tariterators import base_plus_ext

from w2s.data.shards.raw_sample import RawSample, kind
from w2s.data.shards.storage import SourceConnection, open_at

MAX_FILE = 256 << 20
"""Bytes of a file; the sample of a larger one is left out unread."""
_GZIP = b"\x1f\x8b"
"""How a gzip file begins."""
_MAX_SIZE = 1 << 50
"""Bytes that no disk has."""
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
_MAX_HEADER = 1 << 20
"""Bytes of a long name or another extended header; a longer one is damage."""


class CompressedError(ValueError):
    """A tar file inside of a gzip file, which could only be read from its start."""


def read_tar(shard: str, start: int, wanted: Container[str] | None, link: SourceConnection) -> Iterator[RawSample]:
    """Yield the samples of a tar file from a byte on; see `containers`."""
    with open_at(shard, start, link) as stream:
        if start == 0:
            if stream.read(len(_GZIP)) == _GZIP:
                raise CompressedError(shard)
            stream.seek(0)
        yield from _samples(shard, stream, wanted)


def _samples(shard: str, stream: IO[bytes], wanted: Container[str] | None) -> Iterator[RawSample]:
    with _StrictTar.open(fileobj=stream, mode="r:") as tar:
        key, files, damage = "", dict[str, bytes](), ""
        member = tar.first
        while member is not None:
            name, extension = base_plus_ext(member.name) if member.isreg() else ("", "")
            if name:
                if key and name != key:
                    yield RawSample(key, shard, files, damage, end=member.offset)
                    files, damage = {}, ""
                key, extension = name, extension.lower()
                if wanted is None or kind(extension) in wanted:
                    if member.size <= MAX_FILE:
                        files[extension] = _read(tar, member)
                    else:
                        damage = "file is too large"
            member = tar.next()
        if key:
            yield RawSample(key, shard, files, damage, end=tar.offset)


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
