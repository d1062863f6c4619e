"""Folders of webdataset shards with pictures, their names and class numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

_SHARDS = 16


@dataclass(frozen=True)
class Pair:
    """A picture and its name."""

    key: str
    """Name of the sample, without dots."""
    name: str
    png: bytes


def write_folder(folder: Path, pairs: Sequence[Pair], classes: Sequence[str]) -> None:
    """Make a folder of up to 16 shards with `classnames.txt` and `sizes.json`, the same bytes each time.

    Args:
        folder: does not exist yet.
        pairs: samples of `KEY.png`, `KEY.txt` (the name) and `KEY.cls` (its number among the classes).
        classes: the names by class number.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    ordered = sorted(pairs, key=lambda pair: pair.key)
    folder.mkdir()
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    # Related pictures have neighbouring keys; dealing them out leaves no shard with animals only.
    count = min(_SHARDS, len(ordered))
    shards = {f"{shard:06d}.tar": ordered[shard::count] for shard in range(count)}
    for name, members in shards.items():
        _write_shard(folder / name, members, numbers)
    sizes = {name: len(members) for name, members in shards.items()}
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def _write_shard(path: Path, pairs: Sequence[Pair], numbers: Mapping[str, int]) -> None:
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for pair in pairs:
            files = {"png": pair.png, "txt": pair.name.encode(), "cls": b"%d" % numbers[pair.name]}
            writer.write({"__key__": pair.key, **files})
