"""The sources of a run: finding their shards, and checking at the start that they hold what a stage needs."""

from collections.abc import Sequence
from dataclasses import dataclass

from w2s.config.batching import lanes_fit
from w2s.config.sections import DataConfig
from w2s.data.samples.frames import check_decoder, is_video
from w2s.data.shards.containers import COMPRESSED, read_shard
from w2s.data.shards.listing import list_shards, names_digest
from w2s.data.shards.raw_sample import caption_file, find_images, kind
from w2s.data.shards.storage import SourceConnection
from w2s.data.stream.phases import source_names
from w2s.errors import ConfigError, DataError

_WAITS_AT_THE_START = (0.5, 2.0, 8.0)
"""Seconds before each new try while a name may be wrong."""
_TRIED_SHARDS = 3
"""Damaged shards after which a source is refused."""


@dataclass(frozen=True)
class Source:
    """Shards that are drawn from with one probability."""

    name: str
    """Short name for metrics, different for each source."""
    pattern: str
    """What the configuration says."""
    shards: list[str]
    digest: str
    """Of the shards' names."""


def find_sources(data: DataConfig, global_batch: int, size: int, *, captions: bool) -> list[Source]:
    """List the sources of a run, and check that they have enough shards for its lanes and what a stage needs.

    Args:
        data: where the samples are.
        global_batch: samples of a step over all ranks.
        size: number of reading ranks.
        captions: whether samples need a caption.

    Raises:
        ConfigError: too few shards.
        DataError: shards that are missing or lack images or captions.
    """
    sources = list_sources(data)
    smallest = min(sources, key=lambda source: len(source.shards))
    lanes, shards = data.lanes, len(smallest.shards)
    if shards < lanes and not data.replacement:
        fitting = [n for n in range(size, shards + 1, size) if lanes_fit(n, global_batch, size)]
        fix = f"use data.lanes={fitting[-1]} or data.replacement=true" if fitting else "use data.replacement=true"
        what = "data.train" if len(sources) == 1 else smallest.pattern
        raise ConfigError(f"data.lanes={lanes} needs as many shards, {what} has {shards}: {fix}")
    for source in sources:
        check_source(source.shards, data.image_key, data.caption_key if captions else None)
    return sources


def list_sources(data: DataConfig) -> list[Source]:
    """Find the sources of all phases, each once.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: shards that are missing.
    """
    names = source_names(data)
    by_text = {text: list_shards(text, allow_pipe=data.allow_pipe) for text in names}
    return [Source(names[text], text, shards, names_digest(shards)) for text, shards in by_text.items()]


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
            if len(damages) == _TRIED_SHARDS:
                break
    raise damages[0] if damages else DataError(f"{shards[0]} and the other shards of its source have no samples")


class _DamagedError(DataError):
    """A shard that cannot be read from its start."""


def _check_shard(shard: str, image_key: str, caption_key: str | None) -> bool:
    """Check the first sample with an image; return whether there is any sample."""
    extensions: set[str] = set()
    sample = None
    for sample in read_shard(shard, link=SourceConnection(waits=_WAITS_AT_THE_START)):
        if sample.damage == COMPRESSED:
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
