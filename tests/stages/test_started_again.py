"""Ranks that are started again after one was killed."""

import signal
import time
from pathlib import Path

import pytest

from tests.running import ranks_of
from tests.stages.runs import DEADLINE, QUIET, history, records, start_command
from w2s.processes.cleanup import in_memory


@pytest.mark.slow
def test_from_the_memory_of_the_host(base: list[str], root: Path) -> None:
    """Bit for bit, and nothing is left there."""
    options = [*base, *QUIET, "train.steps=60", "checkpoint.every=3", "train.micro_batch=8", "data.workers=0"]
    run = root / "from-memory"
    kept = ["checkpoint.memory=true", f"run.name={run.name}"]
    command = start_command("stage", "mim", *options, *kept, "--nproc", "2", "--restarts", "1")
    end = time.monotonic() + DEADLINE
    while not any(record["step"] >= 7 for record in records(run)):
        assert command.poll() is None and time.monotonic() < end, command.communicate()[1]
        time.sleep(0.01)
    held = list(in_memory(command.pid).glob("*/rank-*.step-*"))
    ranks_of(command.pid)[-1].send_signal(signal.SIGKILL)
    out, error = command.communicate(timeout=DEADLINE)
    assert command.returncode == 0, error
    assert "a rank was killed; all ranks are started again (1 of 1)" in out
    assert "from the memory of the hosts" in " ".join(out.split())
    assert len(held) >= 2
    assert not in_memory(command.pid).exists()
    whole = root / "never-killed"
    command = start_command("stage", "mim", *options, f"run.name={whole.name}", "--nproc", "2")
    assert command.wait(DEADLINE) == 0
    for name in ("step", "loss", "grad_norm"):
        assert history(run, name) == history(whole, name), name


def test_a_memory_that_nobody_would_read_is_refused(base: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    from w2s.cli import app

    code = app(["stage", "mim", *base, "checkpoint.memory=true"], standalone_mode=False)
    assert code == 2
    assert (
        "checkpoint.memory=true is for ranks that are started again: use it with --restarts N" in capfd.readouterr().err
    )
