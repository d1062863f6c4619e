"""Whether a checkpoint is what was written, and where a run continues when its newest is not.

Every rank calls, where there are several: each reads its share of the files, so that each file is read once.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from w2s.checkpoint.own.checkpoint_folders import (
    DAMAGED,
    WITHOUT_MANIFEST,
    all_of,
    clear,
    latest,
    named_latest,
    point,
    remove,
    step_of,
)
from w2s.checkpoint.own.manifest import NAME, Manifest, read_manifest
from w2s.errors import CheckpointError
from w2s.files import read_json
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks

logger = logging.getLogger(__name__)

_NAMED = 3
"""Damages that are named; more are counted."""


def damage(checkpoint: Path, *, quick: bool = False) -> list[str]:
    """Say what is wrong with a checkpoint; nothing for a whole one. Every rank calls.

    Manifest, meta.json and the name of the folder have to agree on the step. Of a checkpoint that was written without a
    manifest nothing more is known.

    Args:
        checkpoint: the folder.
        quick: look at the sizes of the files alone.
    """
    reader, readers = process_groups.rank_and_size()
    everyones = process_groups.gather(_damage(checkpoint, reader, readers, quick))
    return sorted({line for lines in everyones for line in lines})


def is_verifiable(checkpoint: Path) -> bool:
    """Whether a checkpoint has checksums, or should have: w2s did not always write them."""
    return (checkpoint / NAME).exists() or read_json(checkpoint / "meta.json").get("format") != WITHOUT_MANIFEST


def verify(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not what was written; other people's weights pass. Every rank calls.

    Raises:
        CheckpointError: it is damaged.
    """
    if step_of(checkpoint) is None and not any((checkpoint / name).is_file() for name in (NAME, "meta.json")):
        return
    trouble = damage(checkpoint)
    if trouble:
        raise CheckpointError(f"{checkpoint} is damaged: {in_short(trouble)}: use another checkpoint")
    _note_if_unverifiable(checkpoint)


def recover(run: Path, ranks: Ranks, *, strict: bool) -> None:
    """Make the newest whole checkpoint of a run its latest, and clear what dead writers left. Every rank calls.

    What is damaged and newer is set aside, until the run has passed its step again.

    Args:
        run: the run's folder.
        ranks: this process among all.
        strict: stop where the newest is damaged.

    Raises:
        CheckpointError: none is whole, or with `strict` the newest is not.
    """
    if ranks.main:
        clear(run)
    candidates = ranks.broadcast(_in_order(run) if ranks.main else [])
    passed: dict[Path, list[str]] = {}
    for path in candidates:
        trouble = damage(path)
        if not trouble:
            if ranks.main:
                _resume_from(run, path, passed)
            ranks.barrier()
            return
        passed[path] = trouble
        if strict:
            raise CheckpointError(
                f"{path} is damaged: {in_short(trouble)}: leave out checkpoint.strict=true to take an older one"
            )
    if candidates:
        newest = candidates[0]
        raise CheckpointError(
            f"no checkpoint of {run} is whole, {newest.name} is damaged: {in_short(passed[newest])}: "
            "put back a copy, or begin anew with another run.name"
        )


def in_short(faults: Sequence[str]) -> str:
    """What is wrong, in a few words."""
    rest = len(faults) - _NAMED
    return ", ".join(faults[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _in_order(run: Path) -> list[Path]:
    """The checkpoints of a run as it would continue from them: its latest, then the others, the newest first."""
    first = latest(run)
    return [path for path in [first] if path] + [path for path in reversed(all_of(run)) if path != first]


def _resume_from(run: Path, whole: Path, passed: dict[Path, list[str]]) -> None:
    named = named_latest(run)
    if not passed and named != whole.name:
        logger.warning("%s names no checkpoint: %s is the newest", whole.with_name("latest"), whole.name)
    for path, faults in passed.items():
        steps = (step_of(path) or 0) - (step_of(whole) or 0)
        again = f", {steps} steps are repeated" if steps > 0 else ""
        logger.warning("%s is damaged: %s; resumes from %s%s", path, in_short(faults), whole.name, again)
        aside = path.with_name(f"{path.name}{DAMAGED}")
        if aside.exists():
            remove(aside)
        path.rename(aside)
    if named != whole.name:
        point(run, whole)
    _note_if_unverifiable(whole)


def _note_if_unverifiable(checkpoint: Path) -> None:
    if not is_verifiable(checkpoint):
        logger.warning("%s cannot be verified: it was written without checksums", checkpoint)


def _damage(checkpoint: Path, reader: int, readers: int, quick: bool) -> list[str]:
    meta = read_json(checkpoint / "meta.json")
    manifest: Manifest | None = None
    troubles: list[str] = []
    if is_verifiable(checkpoint):
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError as error:
            return [str(error), *([] if meta else ["meta.json cannot be read"])]
        troubles = manifest.damage(checkpoint, manifest.share(reader, readers), quick=quick)
    steps = {"meta.json": meta.get("step"), NAME: manifest.step if manifest else None}
    known = {name: step for name, step in steps.items() if step is not None}
    named = step_of(checkpoint)
    right = known.get(NAME) if named is None else named
    return troubles + [
        f"{name} is of step {step}" for name, step in known.items() if right is not None and step != right
    ]
