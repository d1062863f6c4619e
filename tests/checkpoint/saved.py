"""Checkpoints of a run that hold little: made at once, for tests of what becomes of their files."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from w2s.checkpoint.own.checkpoint_folders import Meta, Saving
from w2s.checkpoint.own.manifest import NAME, read_manifest, write_manifest
from w2s.config.sections import CheckpointConfig
from w2s.files import Checksum, checksums
from w2s.megatron.parallel.process_groups import Ranks


def meta(step: int, **changes: Any) -> Meta:
    known = {"config": {"stage": "mim"}, "data": {}, "parent": None, "mlflow_run_id": f"id-{step}", "versions": {}}
    return Meta(stage="mim", step=step, samples=8 * step, **{**known, **changes})


class Written:
    """A write that is done at once: two files that are others at every step."""

    written = True

    def __init__(self, folder: Path) -> None:
        self.files = [folder / "__0_0.distcp", folder / "__0_1.distcp"]
        for index, path in enumerate(self.files):
            path.write_bytes(f"{index} of {folder.name[:14]}\n".encode() * 1000)
        (folder / ".metadata").write_bytes(b"metadata")

    def wait(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def finish(self) -> Mapping[str, Checksum]:
        return checksums(self.files)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def seal_again(checkpoint: Path) -> None:
    """Give a checkpoint whose files somebody has changed a manifest that knows no better."""
    files = [path for path in checkpoint.iterdir() if path.name != NAME]
    write_manifest(checkpoint, read_manifest(checkpoint).step, checksums(files))


def save(run: Path, meta: Meta, keep: int, ranks: Ranks, keep_at: Sequence[int] = ()) -> Path:
    return Saving(run, meta, Written, CheckpointConfig(keep=keep, keep_at=list(keep_at)), ranks).finish()
