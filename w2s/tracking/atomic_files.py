"""Writing into a run folder, with errors that a user understands."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from w2s.errors import FREE_SPACE, UserError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Names the file and the fix when the system refuses to write `path`.

    Yields:
        `path`, whose folder exists.

    Raises:
        UserError: the folder is read-only, is not a folder, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot write {path} ({reason}): {FREE_SPACE}") from error


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        UserError: the system refuses.
    """
    with writing(folder):
        folder.mkdir(exist_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all.

    Raises:
        UserError: the system refuses to write there.
    """
    with writing(path):
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
