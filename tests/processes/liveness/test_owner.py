"""The lock of a run folder."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from w2s.errors import UserError
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.liveness.owner import owned

HOLD = """
import fcntl, json, os, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(json.dumps({"host": "other", "pid": os.getpid(), "since": "noon"}))
file.flush()
if os.fork() == 0:
    print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that owns the folder, with a child that has its file open too."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".owner")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_one_is_dead(
    alone: Ranks, tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    expected = f"{tmp_path} is in use by process {holder.pid} on other since noon: wait for its end, stop it, or choose"
    with pytest.raises(UserError, match=re.escape(expected)) as caught, owned(tmp_path, alone):
        pass
    assert caught.value.exit_code == 2
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with owned(tmp_path, alone):  # its child lives on, and has no lock
        owner = json.loads((tmp_path / ".owner").read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
    assert holder.stdin is not None
    holder.stdin.close()


def test_the_lock_ends_with_the_block(alone: Ranks, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with owned(tmp_path, alone):
        assert _is_free(tmp_path / ".owner") is False
    assert _is_free(tmp_path / ".owner") is True


def test_a_run_that_was_refused_leaves_no_folder(alone: Ranks, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such teacher"), owned(tmp_path / "run", alone):
        raise UserError("no such teacher")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_while_it_is_taken_is_made_again(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner before removes its file after this run has opened it and before it has the lock."""
    lock, gone = fcntl.lockf, []

    def late(file: object, how: int) -> None:
        if not gone:
            gone.append(True)
            (tmp_path / "run" / ".owner").unlink()
            (tmp_path / "run").rmdir()
        lock(file, how)  # type: ignore[call-overload]

    monkeypatch.setattr(fcntl, "lockf", late)
    with owned(tmp_path / "run", alone):
        assert _is_free(tmp_path / "run" / ".owner") is False


def test_without_locks_there_is_a_note(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with owned(tmp_path, alone):
        assert "is on a file system without locks: start no second run there" in caplog.text


def test_a_folder_that_cannot_be_written_is_said(alone: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/run/\.owner"), owned(tmp_path / "file" / "run", alone):
        pass


def _is_free(path: Path) -> bool:
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", take, str(path)], capture_output=True).returncode == 0
