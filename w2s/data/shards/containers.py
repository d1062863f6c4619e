"""The samples of a shard in order, from a position on, whatever kind of file it is.

A container is a function of this kind, and `read_shard` calls it:

    def read_KIND(shard: str, start: int, wanted: Container[str] | None, link: Link) -> Iterator[RawSample]

It yields samples that begin at the place `start` or behind it. A place is a number as the container counts them (0 is
the begin of a shard) and `RawSample.end` is that of the next sample, so that reading continues there. It opens the
shard with `storage.open_at`, which bridges what a server does, and lets its exceptions through: `ValueError`,
`EOFError` and those of its library mean damage. A sample without what `wanted` names is yielded all the same.
"""

import tarfile
from collections.abc import Callable, Container, Iterator, Sequence

from w2s.data.shards.clips import find_images, kind
from w2s.data.shards.connection_stats import SourceConnection
from w2s.data.shards.raw_sample import DONE, RawSample, caption_file
from w2s.data.shards.shards import is_parquet
from w2s.data.shards.tar import CompressedError, read_tar
from w2s.data.shards.video import check_decoder, is_video
from w2s.errors import DataError

_WAITS_AT_THE_START = (0.5, 2.0, 8.0)
"""Seconds before each new try while a name may be wrong."""
_COMPRESSED = "shard is compressed"
_TRIED = 3
"""Damaged shards after which a source is refused."""


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
        return _COMPRESSED
    damaged = isinstance(error, tarfile.TarError | EOFError | ValueError)
    return "shard is damaged" if damaged else "shard cannot be read"


def check_source(shards: Sequence[str], image_key: str, caption_key: str | None) -> None:
    """Check that shards hold what a stage needs, by the first of them that is sound; three may be damaged before it.

    Args:
        shards: the shards of a source; a damaged one among them is skipped in training, and so it is here.
        image_key: extensions of the image, separated by `;`.
        caption_key: where captions are, separated by `;`; None where they are not needed.

    Raises:
        DataError: they are damaged, compressed or empty, no sample of the first sound one has an image, or the first
            one with an image has no caption.
        MissingPackageError: it has a video, and PyAV is not installed.
    """
    damages: list[_DamagedError] = []
    for shard in shards:
        try:
            if _check_shard(shard, image_key, caption_key):
                return
        except _DamagedError as damage:
            damages.append(damage)
            if len(damages) == _TRIED:
                break
    raise damages[0] if damages else DataError(f"{shards[0]} and the other shards of its source have no samples")


class _DamagedError(DataError):
    """A shard that cannot be read from its start."""


def _check_shard(shard: str, image_key: str, caption_key: str | None) -> bool:
    """Check the first sample with an image; return whether there is any sample."""
    extensions: set[str] = set()
    sample = None
    for sample in read_shard(shard, link=SourceConnection(waits=_WAITS_AT_THE_START)):
        if sample.damage == _COMPRESSED:
            raise DataError(
                f"{shard} is compressed, which shards must not be: mv {shard} {shard}.gz; gunzip {shard}.gz"
            )
        if sample.damage:
            raise _DamagedError(f"{sample.damage}: replace or remove {shard}")
        extensions |= set(map(kind, sample.files))
        images = find_images(sample.files, image_key)
        if not images:
            continue
        if is_video(images[0]):
            check_decoder()
        if caption_key is not None and not any(caption_file(key) in sample.files for key in caption_key.split(";")):
            raise DataError(
                f"sample {sample.key} of {shard} has no caption '.{caption_key}', only {_names(extensions)}: "
                "set data.caption_key"
            )
        return True
    if sample is None:
        return False
    raise DataError(f"{shard} has no image '.{image_key}', only {_names(extensions)}: set data.image_key")


def _names(extensions: set[str]) -> str:
    return ", ".join(f".{name}" for name in sorted(extensions))
