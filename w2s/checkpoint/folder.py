"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from w2s.errors import UserError


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder` to write into, and rename it at the end; after an error nothing is left.

    Raises:
        UserError: `folder` exists already, or cannot be made.
    """
    if folder.exists():
        raise UserError(f"--out {folder} exists already: choose another folder")
    scratch = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        scratch.rename(folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
