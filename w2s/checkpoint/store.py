"""Checkpoints of a run on disk: written whole or not at all, the newest few kept.

RUN/checkpoints/step-00000400/   tensors in Megatron's distributed format, and meta.json
RUN/checkpoints/latest           name of the newest
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w2s.errors import CheckpointError
from w2s.megatron.groups import Ranks

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What is known of a checkpoint beside its tensors."""

    stage: str
    """Stage that wrote it."""
    step: int
    """Optimizer steps done."""
    samples: int
    """Samples seen over all ranks."""
    config: Mapping[str, Any]
    """The run's configuration."""
    data: Mapping[str, Any]
    """Position in the data, merged over the ranks."""
    parent: str | None
    """Checkpoint that the run started from."""
    mlflow_run_id: str | None
    """MLflow run that logs it."""
    versions: Mapping[str, str]
    """Releases of the packages that matter."""
    format: int = FORMAT
    """Version of this layout."""


def checkpoints_of(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / "checkpoints"


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, if it has one."""
    pointer = checkpoints_of(run) / "latest"
    if not pointer.is_file():
        return None
    path = checkpoints_of(run) / pointer.read_text(encoding="utf-8").strip()
    if not (path / "meta.json").is_file():
        raise CheckpointError(f"{pointer} names {path.name}, which is not a whole checkpoint: put another name in it")
    return path


def read_meta(checkpoint: Path) -> Meta:
    """Read what is known of a checkpoint.

    Raises:
        CheckpointError: no checkpoint, or one of another version of this layout.
    """
    path = checkpoint / "meta.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a w2s checkpoint: {path.name} cannot be read") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has layout version {content.get('format')}, this w2s reads {FORMAT}: "
            "use the w2s that wrote it"
        )
    return Meta(**content)


def save(run: Path, meta: Meta, write: Callable[[Path], None], keep: int, ranks: Ranks) -> Path:
    """Write a checkpoint into a temporary folder, then rename it, then point `latest` to it; every rank calls.

    Args:
        run: the run's folder.
        meta: what goes into meta.json.
        write: writes this rank's tensors into an existing empty folder.
        keep: newest checkpoints that stay.
        ranks: this process among all.
    """
    folder = checkpoints_of(run)
    final = folder / f"step-{meta.step:08d}"
    scratch = folder / f".{final.name}.partial"
    if ranks.main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    ranks.barrier()
    write(scratch)
    ranks.barrier()
    if ranks.main:
        (scratch / "meta.json").write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
        _point(folder, final)
        _prune(folder, keep)
    ranks.barrier()
    return final


def _point(folder: Path, checkpoint: Path) -> None:
    scratch = folder / ".latest.partial"
    scratch.write_text(checkpoint.name, encoding="utf-8")
    os.replace(scratch, folder / "latest")


def _prune(folder: Path, keep: int) -> None:
    whole = sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name))
    for path in [*whole[:-keep], *folder.glob(".step-*.partial")]:
        shutil.rmtree(path)
