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
from typing import Any, Protocol, get_origin, get_type_hints

from w2s.config.sections import CheckpointConfig
from w2s.errors import CheckpointError
from w2s.megatron.groups import Ranks
from w2s.redaction import resolved

FORMAT = 1
STEP_NAME = re.compile(r"step-(\d+)")
"""Name of the folder of a checkpoint."""


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
    """The run's configuration, as `w2s.config.naming.written` gives it."""
    data: Mapping[str, Any]
    """Position in the data, merged over the ranks."""
    parent: str | None
    """Checkpoint that the run started from; `VISION and TEXT` where its towers came from two."""
    mlflow_run_id: str | None
    """MLflow run that logs it."""
    versions: Mapping[str, str]
    """Releases of the packages that matter."""
    format: int = FORMAT
    """Version of this layout."""

    def setting(self, section: str, key: str) -> Any:
        """Return a text of the run's configuration.

        Raises:
            CheckpointError: it is not there.
        """
        found = self.config[section].get(key) if isinstance(self.config.get(section), Mapping) else None
        if not isinstance(found, str):
            raise CheckpointError(f"a checkpoint of {self.stage} has no {section}.{key} in its meta.json: use another")
        return found


def checkpoints_of(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / "checkpoints"


def step_name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def kept_steps(steps: int, config: CheckpointConfig) -> set[int]:
    """Return the steps whose checkpoints a run of `steps` steps leaves behind."""
    chosen = {step for step in config.keep_at if step <= steps}
    saved = sorted({*range(config.every, steps, config.every), *chosen, steps})
    return {*saved[-config.keep :], *chosen}


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is not a w2s checkpoint: {path.name} cannot be read") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has layout version {version}, this w2s reads {FORMAT}: use the w2s that wrote it"
        )
    wrong = [name for name, kind in get_type_hints(Meta).items() if not _is(content.get(name), kind)]
    if wrong or content.keys() != get_type_hints(Meta).keys():
        raise CheckpointError(f"{path} is damaged ({', '.join(wrong) or 'unknown keys'}): use another checkpoint")
    return Meta(**{**content, "config": resolved(content["config"])})


def _is(value: object, kind: Any) -> bool:
    """Whether a value of JSON is one of a field of `Meta`."""
    if get_origin(kind) is Mapping:
        return isinstance(value, dict)
    return isinstance(value, kind) and not (kind is int and not 0 <= value < 2**63)


class Unfinished(Protocol):
    """Tensors that are being written."""

    @property
    def written(self) -> bool:
        """Whether this rank has written its own."""

    def finish(self) -> None:
        """Wait for all ranks; every rank calls."""


class Saving:
    """A checkpoint that is written into a temporary folder; `finish` renames it, then points `latest` to it.

    Every rank makes one and finishes it, however long after.

    Args:
        run: the run's folder.
        meta: what goes into meta.json.
        write: begins to write this rank's tensors into an existing empty folder.
        keep: what stays beside it.
        ranks: this process among all.
    """

    def __init__(
        self, run: Path, meta: Meta, write: Callable[[Path], Unfinished], keep: CheckpointConfig, ranks: Ranks
    ) -> None:
        self._meta, self._keep, self._ranks = meta, keep, ranks
        self._folder = checkpoints_of(run)
        self._final = self._folder / step_name(meta.step)
        self._scratch = self._folder / f".{self._final.name}.partial"
        if ranks.main:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir(parents=True)
        ranks.barrier()
        self._writing = write(self._scratch)

    @property
    def written(self) -> bool:
        """Whether this rank has written its tensors."""
        return self._writing.written

    def finish(self) -> Path:
        """Make it the newest checkpoint, when all ranks have written; return its folder. Every rank calls."""
        self._writing.finish()
        if self._ranks.main:
            meta = json.dumps(asdict(self._meta), indent=1)
            (self._scratch / "meta.json").write_text(meta, encoding="utf-8")
            shutil.rmtree(self._final, ignore_errors=True)
            self._scratch.rename(self._final)
            _point(self._folder, self._final)
            _prune(self._folder, self._keep)
        self._ranks.barrier()
        return self._final


def _point(folder: Path, checkpoint: Path) -> None:
    scratch = folder / ".latest.partial"
    scratch.write_text(checkpoint.name, encoding="utf-8")
    os.replace(scratch, folder / "latest")


def _prune(folder: Path, keep: CheckpointConfig) -> None:
    whole = sorted(path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name))
    kept = {step_name(step) for step in keep.keep_at}
    old = [path for path in whole[: -keep.keep] if path.name not in kept]
    for path in [*old, *folder.glob(".step-*.partial")]:
        shutil.rmtree(path)
