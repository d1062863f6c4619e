"""Webdataset shards: which files they are, and their samples, undecoded."""

import glob
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import braceexpand
from webdataset.tariterators import group_by_keys, tar_file_expander

from w2s.errors import DataError


@dataclass(frozen=True)
class RawSample:
    """The files of one sample, or the place where a shard could not be read on."""

    key: str
    shard: str
    files: dict[str, bytes]
    """Contents by lower-case extension."""
    damage: str = ""
    """Why there are no files; empty for a sound sample."""


def list_shards(source: str, option: str = "data.train") -> list[Path]:
    """List the shards of a source string, sorted.

    Args:
        source: a folder, a file, a glob or a brace pattern such as `a/{000..015}.tar`; `::` joins several.
        option: the configuration key to name in an error.

    Raises:
        DataError: nothing is named, or what is named does not exist.
    """
    parts = [part.strip() for part in source.split("::")]
    if not all(parts):
        raise DataError(f"{option}='{source}' names no shards: give a folder, a glob or a brace pattern")
    return sorted(path for part in parts for path in _expand(part, option))


def _expand(pattern: str, option: str) -> list[Path]:
    try:
        names = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise DataError(f"{option}: the braces of '{pattern}' do not match ({error})") from error
    paths = [path for name in names for path in _find(Path(name).expanduser())]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(names) == 1:
        raise DataError(f"{option}={pattern} does not exist: check the path")
    if missing:
        raise DataError(
            f"{option}: {len(missing)} of the {len(names)} shards of '{pattern}' are missing, the first is {missing[0]}"
        )
    if not paths:
        raise DataError(f"{option}={pattern} has no shards: no .tar file is there")
    return paths


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        return list(path.glob("*.tar"))
    if glob.has_magic(str(path)):
        return [Path(name) for name in glob.glob(str(path))]
    return [path]


def read_shard(shard: str) -> Iterator[RawSample]:
    """Yield the samples of a shard in order, undecoded.

    A shard that is damaged, gone or empty ends with a sample that says so, so that the loss is counted and the order
    of all other samples stays what it was.
    """
    count = 0
    try:
        with open(shard, "rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": shard, "stream": stream}])):
                files = {name: data for name, data in sample.items() if not name.startswith("__")}
                yield RawSample(sample["__key__"], shard, files)
                count += 1
    except (tarfile.TarError, OSError, EOFError, ValueError):
        yield RawSample(f"sample {count}", shard, {}, damage="shard is damaged")
        return
    if count == 0:
        yield RawSample("sample 0", shard, {}, damage="shard is empty")


def find_image(files: dict[str, bytes], image_key: str) -> bytes | None:
    """Return the image of a sample: the first of the `;`-separated extensions that is there."""
    return next((files[name] for name in image_key.split(";") if name in files), None)


def check_shard(shard: Path, image_key: str, caption_key: str | None) -> None:
    """Check that a shard holds what a stage needs, by its first sample with an image.

    Args:
        shard: the shard to open.
        image_key: extensions of the image, separated by `;`.
        caption_key: extension of the caption; None where captions are not needed.

    Raises:
        DataError: it is damaged or empty, no sample has an image, or the first one with an image has no caption.
    """
    extensions: set[str] = set()
    for sample in read_shard(str(shard)):
        if sample.damage:
            raise DataError(f"{sample.damage}: replace or remove {shard}")
        extensions |= set(sample.files)
        if find_image(sample.files, image_key) is None:
            continue
        if caption_key is not None and caption_key not in sample.files:
            raise DataError(
                f"sample {sample.key} of {shard} has no caption '.{caption_key}', only {_names(extensions)}: "
                "set data.caption_key"
            )
        return
    raise DataError(f"{shard} has no image '.{image_key}', only {_names(extensions)}: set data.image_key")


def _names(extensions: set[str]) -> str:
    return ", ".join(f".{name}" for name in sorted(extensions))
