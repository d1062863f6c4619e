"""The samples of a shard in order, from a position on, whatever kind of file it is.

A container is a function of this kind, and `read_shard` calls it:

    def read_KIND(shard: str, start: int, wanted: Container[str] | None, link: SourceConnection) -> Iterator[RawSample]

It yields samples that begin at the place `start` or behind it. A place is a number as the container counts them (0 is
the begin of a shard) and `RawSample.end` is that of the next sample, so that reading continues there. It opens the
shard with `storage.open_at`, which bridges what a server does, and lets its exceptions through: `ValueError`,
`EOFError` and those of its library mean damage. A sample without what `wanted` names is yielded all the same.
"""

import tarfile
from collections.abc import Callable, Container, Iterator

from w2s.data.shards.listing import is_parquet
from w2s.data.shards.raw_sample import DONE, RawSample
from w2s.data.shards.storage import SourceConnection
from w2s.data.shards.tar import CompressedError, read_tar

COMPRESSED = "shard is compressed"
"""Damage of a shard that has to be unpacked."""


def read_shard(
    shard: str, start: int = 0, wanted: Container[str] | None = None, link: SourceConnection | None = None
) -> Iterator[RawSample]:
    """Yield the samples of a shard in order, undecoded.

    A shard that is damaged or gone ends with a sample that says so, so that the loss is counted and the order of all
    other samples stays what it was. An empty one has none.

    Args:
        shard: path or URL.
        start: where a sample begins, as in `RawSample.end`.
        wanted: extensions that are read, without a number or with (`jpg`: `000.jpg` too); None reads all.
        link: patience with the shard's server, and what became of it.
    """
    if start == DONE:
        return
    count = 0
    try:
        for sample in _reader(shard)(shard, start, wanted, link or SourceConnection()):
            yield sample
            count += 1
    except Exception as error:  # tarfile and the drivers of fsspec stumble in many ways
        yield RawSample(f"sample {count}", shard, {}, damage=_reason(error))


def _reader(shard: str) -> Callable[[str, int, Container[str] | None, SourceConnection], Iterator[RawSample]]:
    if not is_parquet(shard):
        return read_tar
    from w2s.data.shards.parquet import read_parquet  # pyarrow, which most processes need not load

    return read_parquet


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "shard is gone"
    if isinstance(error, CompressedError):
        return COMPRESSED
    damaged = isinstance(error, tarfile.TarError | EOFError | ValueError)
    return "shard is damaged" if damaged else "shard cannot be read"
