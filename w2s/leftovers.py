"""Temporary files and semaphores of processes that were killed: they are named after their process, and swept later."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.util import Finalize
from pathlib import Path

_SEMAPHORES = Path("/dev/shm")
_LONGEST = 45
"""Bytes in the path of a temporary folder below which there may be sockets, whose paths have at most 108."""


def _family() -> str:
    """The begin of the names that the processes of this machine give; a container has process ids of its own."""
    try:
        number = int(os.readlink("/proc/self/ns/pid").strip("pid:[]"))
    except (OSError, ValueError):
        number = 0
    return f"w2s-{number:x}-"


def mark() -> str:
    """Return what the names of this process's temporary folders and semaphores begin with."""
    return f"{_family()}{os.getpid():x}-"


@contextmanager
def marked() -> Iterator[None]:
    """Name what this process leaves among temporary files and semaphores, as long as the block runs.

    Its children, reading processes say, put their files into the same folder.
    """
    settings = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before, settings["semprefix"] = settings["semprefix"], f"/{mark().removesuffix('-')}"
    try:
        with _own_folder() if len(tempfile.gettempdir().encode()) <= _LONGEST else nullcontext():
            yield
    finally:
        settings["semprefix"] = before


@contextmanager
def _own_folder() -> Iterator[None]:
    variable, before = os.environ.get("TMPDIR"), tempfile.tempdir
    folder = tempfile.mkdtemp(prefix=mark())
    # After multiprocessing's own folder, which is in there.
    Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-200)
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


def temporary() -> Path:
    """Return the system's folder of temporary files, also while this process has one of its own."""
    place = Path(tempfile.gettempdir())
    return place.parent if place.name.startswith(_family()) else place


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are gone have left in a folder of temporary files and in memory."""
    for path in [*folder.glob(f"{_family()}*"), *_SEMAPHORES.glob(f"sem.{_family()}*")]:
        pid = path.name.partition(_family())[2].partition("-")[0]
        with suppress(OSError, ValueError):
            if not Path(f"/proc/{int(pid, 16)}").exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
