"""manifest.json: the files that make up a checkpoint, with their sizes and checksums, and its step.

It is written last: a folder that has one was written whole. It has a checksum of its own.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w2s.errors import CheckpointError
from w2s.files import THREADS, Checksum, checksum

NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint."""

    step: int
    """Optimizer steps done."""
    files: Mapping[str, Checksum]
    """Every file beside the manifest itself, by name."""

    def share(self, reader: int, readers: int) -> list[str]:
        """Return the files that one of `readers` reads: each file is one reader's, all have about as many bytes."""
        by_size = sorted(self.files, key=lambda name: (self.files[name].bytes, name), reverse=True)
        return by_size[reader::readers]

    def damage(self, folder: Path, names: Sequence[str], *, quick: bool) -> list[str]:
        """Say what is wrong with some of the files.

        Args:
            folder: the checkpoint.
            names: the files.
            quick: look at their sizes alone.
        """

        def wrong(name: str) -> str:
            path, written = folder / name, self.files.get(name)
            if written is None:
                return f"{NAME} does not name {name}"
            try:
                if not path.is_file():
                    return f"{name} is missing"
                size = path.stat().st_size
                if size != written.bytes:
                    return f"{name} has {size} of {written.bytes} bytes"
                return "" if quick or checksum(path) == written else f"{name} has changed since it was written"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"

        with ThreadPoolExecutor(THREADS) as pool:
            return [fault for fault in pool.map(wrong, names) if fault]


def write_manifest(folder: Path, step: int, files: Mapping[str, Checksum]) -> None:
    """Write the manifest of a checkpoint whose other files are there."""
    content: dict[str, Any] = {"step": step, "files": {name: asdict(each) for name, each in sorted(files.items())}}
    content["crc32"] = _checksum_of(content)
    with (folder / NAME).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged; the message says which, and not where.
    """
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        sealed = content.pop("crc32", None)  # there was none in w2s 0.1
        files = {name: Checksum(**each) for name, each in content["files"].items()}
        sound = type(content["step"]) is int and all(type(each.bytes) is int for each in files.values())
        if sealed not in (None, _checksum_of(content)) or content.keys() != {"step", "files"} or not sound:
            raise CheckpointError(f"{NAME} has changed since it was written")
        return Manifest(content["step"], files)
    except FileNotFoundError:
        raise CheckpointError(f"{NAME} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{NAME} cannot be read") from error


def _checksum_of(content: Mapping[str, Any]) -> str:
    """Of step and files, whatever the spaces between them."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
