"""`w2s checkpoint`: what a run's checkpoints are, and which can go."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from w2s.checkpoint.own.checkpoint_folders import all_of, latest, point, read_meta, remove, set_aside_of, step_of
from w2s.checkpoint.own.verifying import damage, in_short, is_verifiable
from w2s.errors import CheckpointError

COLUMNS = ["", "bytes", "written", "state", ""]


@dataclass(frozen=True)
class Found:
    """A checkpoint of a run."""

    path: Path
    bytes: int
    written: datetime
    damage: list[str]
    verifiable: bool
    latest: bool

    @property
    def state(self) -> str:
        """Whether it is whole."""
        if self.damage:
            return f"damaged: {in_short(self.damage)}"
        return "whole" if self.verifiable else "cannot be verified: written without checksums"

    def row(self) -> list[str]:
        """Return its row of a table."""
        when = self.written.isoformat(" ", "seconds")
        return [self.path.name, f"{self.bytes:,}", when, self.state, "latest" if self.latest else ""]


def look_at(run: Path, *, quick: bool) -> list[Found]:
    """Return a run's checkpoints, the newest last, then those that it has set aside.

    Args:
        run: the run's folder.
        quick: read no files, and tell damage from their sizes alone.
    """
    last = latest(run)
    return [
        Found(
            path=path,
            bytes=sum(file.stat().st_size for file in path.iterdir()),
            written=datetime.fromtimestamp(path.stat().st_mtime),
            damage=damage(path, quick=quick),
            verifiable=is_verifiable(path),
            latest=path == last,
        )
        for path in [*all_of(run), *set_aside_of(run)]
    ]


def prune(run: Path, keep: int | None) -> list[Found]:
    """Remove a run's damaged checkpoints, and all but the newest whole ones; return what was removed.

    The one that the run continues from stays, and the steps of `checkpoint.keep_at`.

    Args:
        run: the run's folder.
        keep: how many whole ones stay; None for all.

    Raises:
        CheckpointError: none is whole; nothing is removed.
    """
    checkpoints, aside = look_at(run, quick=False), set_aside_of(run)
    whole = [each for each in checkpoints if not each.damage and each.path not in aside]
    if not whole:
        raise CheckpointError(f"no checkpoint of {run} is whole: nothing is removed")
    chosen = read_meta(whole[-1].path).config.get("checkpoint", {}).get("keep_at", [])
    newest = whole if keep is None else whole[-keep:]
    stays = [each for each in whole if each in newest or each.latest or step_of(each.path) in chosen]
    removed = [each for each in checkpoints if each not in stays]
    if any(each.latest for each in removed):
        point(run, whole[-1].path)
    for each in removed:
        remove(each.path)
    return removed
