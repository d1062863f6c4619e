"""Temporary files, semaphores and memory of processes that were killed: named after their process, and swept later."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.util import Finalize
from pathlib import Path

_MEMORY = Path("/dev/shm")
_LONGEST = 45
"""Bytes in the path of a temporary folder below which there may be sockets, whose paths have at most 108."""


def _family() -> str:
    """The begin of the names that the processes of this machine give; a container has process ids of its own."""
    try:
        namespace = int(os.readlink("/proc/self/ns/pid").strip("pid:[]"))
    except (OSError, ValueError):
        namespace = 0
    return f"w2s-{namespace:x}-"


def mark(pid: int | None = None) -> str:
    """Return what the names of the temporary folders and semaphores of a process, by default this one, begin with."""
    return f"{_family()}{pid or os.getpid():x}-"


def in_memory(pid: int) -> Path:
    """Return the folder of files in memory that live as long as a process does."""
    return _MEMORY / f"{mark(pid)}memory"


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
    family = f"{_family()}*"
    for path in [*folder.glob(family), *_MEMORY.glob(family), *_MEMORY.glob(f"sem.{family}")]:
        pid = path.name.partition(_family())[2].partition("-")[0]
        with suppress(OSError, ValueError):
            if not Path(f"/proc/{int(pid, 16)}").exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
