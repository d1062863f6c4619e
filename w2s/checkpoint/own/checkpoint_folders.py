"""Checkpoints of a run on disk: written whole or not at all, the newest few kept.

RUN/checkpoints/step-00000400/   tensors in Megatron's distributed format, meta.json, and manifest.json over all of it
RUN/checkpoints/latest           name of the one to continue from

Beside them may stand, until the run clears them: `.step-….partial`, which was being written, with `.step-….reserved`,
`.step-….removed`, which was being removed, and `step-….damaged`, which a run that continued from an older one has set
aside.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints
from uuid import uuid4

from w2s.checkpoint.own.manifest import read_manifest, write_manifest
from w2s.config.sections import CheckpointConfig
from w2s.errors import FREE_SPACE, CheckpointError
from w2s.files import Checksum, checksums
from w2s.megatron.checkpoint.async_save import AsyncSave
from w2s.megatron.parallel.process_groups import Ranks
from w2s.redaction import resolved

FORMAT = 2
WITHOUT_MANIFEST = 1
"""Version of the layout that had no manifest.json."""
STEP_NAME = re.compile(r"step-(\d+)")
"""Name of the folder of a checkpoint."""
DAMAGED = ".damaged"
"""What is added to the name of one that is set aside."""
RESERVED, RESERVED_BYTES = ".reserved", 2**24
"""File beside a checkpoint that is being written, whose bytes the main rank's small files will take."""


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

    @property
    def trained(self) -> str:
        """The stage whose run has the weights: also of an average of checkpoints, which no stage has written."""
        return str(self.config.get("stage", self.stage))

    def setting(self, section: str, key: str) -> Any:
        """Return a text of the run's configuration.

        Raises:
            CheckpointError: it is not there.
        """
        value = self.config[section].get(key) if isinstance(self.config.get(section), Mapping) else None
        if not isinstance(value, str):
            raise CheckpointError(f"a checkpoint of {self.stage} has no {section}.{key} in its meta.json: use another")
        return value


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


def step_of(checkpoint: Path) -> int | None:
    """Return the step in the name of a run's checkpoint; None for a folder of another name."""
    named = STEP_NAME.fullmatch(checkpoint.name)
    return int(named[1]) if named else None


def all_of(run: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the newest last."""
    folders = [path for path in checkpoints_of(run).glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def set_aside_of(run: Path) -> list[Path]:
    """Return the damaged checkpoints of a run that it has set aside."""
    damaged = checkpoints_of(run).glob(f"step-*{DAMAGED}")
    return sorted(path for path in damaged if STEP_NAME.fullmatch(path.name.removesuffix(DAMAGED)) and path.is_dir())


def latest(run: Path) -> Path | None:
    """Return the checkpoint that a run continues from, if it has one: that which `latest` names, else the newest."""
    checkpoints = all_of(run)
    return next(
        (path for path in checkpoints if path.name == named_latest(run)), checkpoints[-1] if checkpoints else None
    )


def newest_step(run: Path) -> int:
    """Return the step of the checkpoint that a run would continue from; 0 where it has none."""
    newest = latest(run)
    return 0 if newest is None else step_of(newest) or 0


def named_latest(run: Path) -> str:
    """Return what stands in a run's file `latest`; nothing if there is none, or if it is not a file."""
    path = checkpoints_of(run) / "latest"
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    except OSError:
        return ""


def read_meta(checkpoint: Path) -> Meta:
    """Read what is known of a checkpoint; of its files this one alone is verified.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another version of this layout.
    """
    path = checkpoint / "meta.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} is not a w2s checkpoint: {path.name} cannot be read") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version not in (WITHOUT_MANIFEST, FORMAT):
        raise CheckpointError(
            f"{checkpoint} has layout version {version}, this w2s reads {WITHOUT_MANIFEST} and {FORMAT}: "
            "use the w2s that wrote it"
        )
    wrong = [name for name, kind in get_type_hints(Meta).items() if not _is(content.get(name), kind)]
    if wrong or content.keys() != get_type_hints(Meta).keys():
        raise CheckpointError(f"{path} is damaged ({', '.join(wrong) or 'unknown keys'}): use another checkpoint")
    if version == FORMAT:
        _verify_meta(checkpoint)
    return Meta(**{**content, "config": resolved(content["config"])})


def _verify_meta(checkpoint: Path) -> None:
    try:
        wrong = read_manifest(checkpoint).damage(checkpoint, ["meta.json"], quick=False)
    except CheckpointError as error:
        wrong = [str(error)]
    if wrong:
        raise CheckpointError(f"{checkpoint} is damaged: {wrong[0]}: use another checkpoint")


def _is(value: object, kind: Any) -> bool:
    """Whether a value of JSON is one of a field of `Meta`."""
    if get_origin(kind) is Mapping:
        return isinstance(value, dict)
    return isinstance(value, kind) and not (kind is int and not 0 <= value < 2**63)


class Saving:
    """A checkpoint that is written into a temporary folder; `finish` renames it, then points `latest` to it.

    Every rank makes one and finishes it, however long after. The manifest, over the checksums that each rank has taken
    of its own files, is the last thing that is written before.

    Args:
        run: the run's folder.
        meta: what goes into meta.json.
        write: begins to write this rank's tensors into an existing folder.
        keep: what stays beside it.
        ranks: this process among all.

    Attributes:
        step: the updates that it holds.

    Raises:
        CheckpointError: the system refuses to write there; on every rank.
    """

    def __init__(
        self, run: Path, meta: Meta, write: Callable[[Path], AsyncSave], keep: CheckpointConfig, ranks: Ranks
    ) -> None:
        self._run, self._meta, self._keep, self._ranks = run, meta, keep, ranks
        self.step = meta.step
        # A writer that outlives its killed run shall not meet that of the next run.
        name = f".{step_name(meta.step)}.{uuid4().hex[:8]}.partial"
        self._scratch = ranks.broadcast(checkpoints_of(run) / name)
        # Beside the folder: Megatron wants an empty one.
        self._reserve = self._scratch.with_suffix(RESERVED)
        self._on_main(self._begin)
        with self._clearing():
            self._writing = write(self._scratch)

    @property
    def written(self) -> bool:
        """Whether this rank has written its tensors."""
        return self._writing.written

    def abandon(self) -> None:
        """End the writing of this rank: the run fails, and nobody will finish it."""
        self._writing.abandon()

    def finish(self) -> Path:
        """Make it the newest checkpoint, when all ranks have written; return its folder. Every rank calls.

        Raises:
            CheckpointError: the system refuses to write there, which leaves nothing behind; on every rank.
        """
        self._writing.wait()
        with self._clearing():
            self._on_main(self._reserve.unlink)
            files: dict[str, Checksum] = {}
            for of_rank in self._ranks.gather(self._writing.finish()):
                files.update(of_rank)
            self._on_main(lambda: self._conclude(files))
        return checkpoints_of(self._run) / step_name(self._meta.step)

    def _begin(self) -> None:
        """Make the folder, and hold back what the small files will take that the main rank alone writes.

        Without it a disk that the tensors fill to the last byte would let the main rank fail where the others wait.
        """
        with self._clearing():
            self._scratch.mkdir(parents=True)
            with self._reserve.open("wb") as file:
                _occupy(file.fileno(), 2 * RESERVED_BYTES)
                file.truncate(RESERVED_BYTES)  # the rest is for what is written before the tensors

    def _conclude(self, files: Mapping[str, Checksum]) -> None:
        seal(self._scratch, self._meta, files)
        _place(self._run, self._scratch, self._meta.step)
        _prune(self._run, self._keep, self._meta.step)

    def _on_main(self, act: Callable[[], None]) -> None:
        """Let the main rank act; what the system refuses it is an error on every rank."""
        refused = ""
        if self._ranks.main:
            try:
                act()
            except OSError as error:
                why = error.strerror or type(error).__name__
                refused = f"cannot write {self._scratch} ({why}): {FREE_SPACE}"
        refused = self._ranks.broadcast(refused)
        if refused:
            raise CheckpointError(refused)

    @contextmanager
    def _clearing(self) -> Iterator[None]:
        """Leave nothing of a checkpoint that could not be written: it may be what fills the disk."""
        try:
            yield
        except (OSError, CheckpointError):
            if self._ranks.main:
                self._reserve.unlink(missing_ok=True)
                shutil.rmtree(self._scratch, ignore_errors=True)
            raise


def _occupy(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.write(descriptor, bytes(size))  # a file system that knows no such call


def seal(folder: Path, meta: Meta, files: Mapping[str, Checksum]) -> None:
    """Write meta.json, then the manifest of a folder whose tensors are written.

    Args:
        folder: the checkpoint.
        meta: what goes into meta.json.
        files: checksums that are known already; the other files are read.
    """
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    rest = [path for path in folder.iterdir() if path.name not in files]
    write_manifest(folder, meta.step, {**files, **checksums(rest)})


def point(run: Path, checkpoint: Path) -> None:
    """Make a checkpoint of a run its latest."""
    scratch, pointer = checkpoints_of(run) / ".latest.partial", checkpoints_of(run) / "latest"
    scratch.write_text(checkpoint.name, encoding="utf-8")
    if pointer.is_dir() and not pointer.is_symlink():
        shutil.rmtree(pointer)
    os.replace(scratch, pointer)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; if this process dies meanwhile, no half of it stands under its name."""
    gone = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear(run: Path) -> None:
    """Remove what dead writers have left; what one had written whole is put in its place."""
    for path in checkpoints_of(run).glob(".step-*.partial"):
        step = _step_if_whole(path)
        if step is None:
            shutil.rmtree(path, ignore_errors=True)
        else:
            _place(run, path, step)
    for path in checkpoints_of(run).glob(".step-*.removed"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints_of(run).glob(f".step-*{RESERVED}"):
        path.unlink(missing_ok=True)


def _step_if_whole(partial: Path) -> int | None:
    try:
        manifest = read_manifest(partial)
    except CheckpointError:
        return None
    return None if manifest.damage(partial, list(manifest.files), quick=True) else manifest.step


def _place(run: Path, scratch: Path, step: int) -> None:
    final = checkpoints_of(run) / step_name(step)
    if final.exists():
        remove(final)
    scratch.rename(final)
    point(run, final)


def _prune(run: Path, keep: CheckpointConfig, step: int) -> None:
    """Remove what is no longer kept, when the checkpoint of `step` is there."""

    def passed(path: Path) -> bool:
        return int(path.name.removeprefix("step-").removesuffix(DAMAGED)) <= step

    kept = {step_name(chosen) for chosen in keep.keep_at}
    # Those of later steps are of a run that has rolled back since: they are no reason to remove earlier ones.
    old = [path for path in list(filter(passed, all_of(run)))[: -keep.keep] if path.name not in kept]
    for path in [*old, *filter(passed, set_aside_of(run))]:
        remove(path)
    clear(run)
