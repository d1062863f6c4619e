"""manifest.json: the files that make up a checkpoint, with their sizes and checksums, and its step.

It is written last: a folder that has one was written whole.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from w2s.checksum import THREADS, Checksum, checksum
from w2s.errors import CheckpointError

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
            return [found for found in pool.map(wrong, names) if found]


def write_manifest(folder: Path, step: int, files: Mapping[str, Checksum]) -> None:
    """Write the manifest of a checkpoint whose other files are there."""
    content = {"step": step, "files": {name: asdict(each) for name, each in sorted(files.items())}}
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
        files = {name: Checksum(**each) for name, each in content["files"].items()}
        return Manifest(int(content["step"]), files)
    except FileNotFoundError:
        raise CheckpointError(f"{NAME} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{NAME} cannot be read") from error
