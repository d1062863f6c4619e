"""What killed processes leave: it is found by its name, and removed when they are gone."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from w2s.processes.cleanup import mark, marked, sweep, temporary

PROGRAM = """
import multiprocessing, os, signal, sys, tempfile
from w2s.processes.cleanup import marked
with marked():
    context = multiprocessing.get_context("forkserver")
    semaphore = context.Semaphore()
    context.Process(target=abs, args=(1,)).start()  # its server has a socket in a temporary folder
    print(tempfile.gettempdir(), semaphore._semlock.name, flush=True)
    if sys.argv[1] == "killed":
        os.killpg(0, signal.SIGKILL)
"""


def leave(how: str, folder: Path) -> tuple[Path, Path]:
    """Let a process leave a temporary folder and a semaphore; return both."""
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert done.returncode == {"killed": -signal.SIGKILL, "done": 0}[how]
    place, name = done.stdout.split()
    return Path(place), Path("/dev/shm") / f"sem.{name.removeprefix('/')}"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="left-") as name:
        yield Path(name)


def test_what_a_killed_process_leaves_is_swept(short: Path) -> None:
    folder, semaphore = leave("killed", short)
    assert folder.parent == short and list(folder.glob("pymp-*/listener-*")) and semaphore.exists()
    sweep(short)
    assert not folder.exists() and not semaphore.exists()


def test_what_ends_by_itself_leaves_nothing(short: Path) -> None:
    folder, semaphore = leave("done", short)
    assert not folder.exists() and not semaphore.exists()


def test_what_belongs_to_a_living_process_or_to_others_stays(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setenv("TMPDIR", str(short))
    other = short / "w2s-1-ffffff-x"
    other.mkdir()
    with marked():
        own = Path(tempfile.mkdtemp())
        sweep(temporary())
        assert own.is_dir() and own.parent.name.startswith(mark()) and temporary() == short
        assert os.environ["TMPDIR"] == str(own.parent)
    assert other.is_dir() and tempfile.gettempdir() == os.environ["TMPDIR"] == str(short)


def test_a_long_path_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has at most 108 bytes."""
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with marked():
        assert tempfile.gettempdir() == str(long)
