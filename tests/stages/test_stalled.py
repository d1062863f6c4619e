"""Runs of the command of which a process stalls or is killed: all end in time, and who it was is said."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.running import ranks_of, running_after, servers_of
from tests.stages.runs import DEADLINE, records, start_command
from w2s.checkpoint.own import checkpoint_folders
from w2s.processes.liveness.verdict import STOP_SECONDS

SECONDS = 6
"""`hardware.timeout` of these runs."""
START = 5 * DEADLINE
"""Seconds that a run may take to its third step, on a machine that has other things to do."""
ENDLESS = ["train.steps=100000", "checkpoint.every=100000", f"hardware.timeout={SECONDS}"]
LAYOUTS = {
    "data": ["train.micro_batch=8"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2", "train.micro_batch=4"],
}

pytestmark = pytest.mark.slow


def wait_for(happens: Callable[[], object], command: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START
    while not happens():
        if command.poll() is not None or time.monotonic() > end:
            command.kill()
            raise AssertionError(command.communicate()[1])
        time.sleep(0.02)


def start(
    stage: str, options: list[str], run: Path, timeout: int = SECONDS
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start an endless run; return it, and all of its processes once it has logged some steps."""
    command = start_command("stage", stage, *options, *ENDLESS, f"hardware.timeout={timeout}", f"run.name={run.name}")
    wait_for(lambda: len(records(run)) >= 3, command)
    process = psutil.Process(command.pid)
    return command, [process, *process.children(recursive=True)]


def end(command: subprocess.Popen[str], processes: list[psutil.Process], within: float = SECONDS + 10) -> str:
    """Wait for the end of a run; return its error. Its ranks and their helpers end in time, and nothing stays."""
    with_command = [command.pid, *(server.pid for server in servers_of(command.pid))]
    others = [each for each in processes if each.pid not in with_command]
    tracked = [each for each in others if "resource_tracker" not in str(each.cmdline())]
    assert not running_after(tracked, within)
    error = command.communicate(timeout=DEADLINE)[1]
    assert not running_after(processes, 10)
    return next(line for line in error.splitlines() if line.startswith("error"))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_is_stopped(layout: str, rank: int, base: list[str], root: Path) -> None:
    run = root / f"stopped-{layout}-{rank}"
    options = [*base, "eval.shards=", "eval.knn_shards=", "tracking.enabled=false", "--nproc", "2", *LAYOUTS[layout]]
    command, processes = start("mim", options, run)
    ranks = ranks_of(command.pid)
    ranks[rank].suspend()
    error = end(command, processes)
    assert re.fullmatch(
        rf"error: rank {rank} on .* \(process {ranks[rank].pid}\) has been stalled for \d+ s at step \d+, [a-z ]+: it "
        rf"is stopped by a signal \(SIGSTOP\) .*: repeat the command .*; stacks of all ranks are in {run}/stacks\.txt",
        error,
    )
    assert command.returncode == 1


@pytest.mark.parametrize("asked", [False, True])
def test_a_reading_process_that_is_stopped(asked: bool, base: list[str], root: Path) -> None:
    """Also where SIGTERM asks the run to stop, which cannot save then."""
    run = root / f"reader-{asked}"
    options = [*base, "eval.shards=", "eval.knn_shards=", "tracking.enabled=false", "data.workers=1"]
    command, processes = start("mim", options, run, timeout=600 if asked else SECONDS)
    reader = processes[0].children(recursive=True)
    (reader,) = [each for each in reader if psutil.Process(each.ppid()).ppid() == command.pid]
    reader.suspend()
    if asked:
        wait_for(lambda: _rests(run), command)  # what was read before is used up
        command.send_signal(signal.SIGTERM)
    error = end(command, processes, within=(STOP_SECONDS if asked else SECONDS) + 10)
    begin = "stopped by SIGTERM, nothing new was saved, as rank 0" if asked else "rank 0"
    assert error.startswith(f"error: {begin} on ")
    assert f"waiting for samples: reading process {reader.pid} is stopped by a signal" in error
    assert command.returncode == (128 + signal.SIGTERM if asked else 1)


def _rests(run: Path) -> bool:
    """Whether nothing was logged for five seconds."""
    return time.time() - (run / "metrics.jsonl").stat().st_mtime > 5


STOPPED_WRITER = """
import os, signal, sys
from w2s import cli
from w2s.megatron.checkpoint import async_save

def stop(*_, **__):
    os.kill(os.getpid(), signal.SIGSTOP)

begin = async_save.compat.begin_save
async_save.compat.begin_save = lambda *given: begin(*given)._replace(async_fn=stop, preload_fn=None)
sys.argv[0] = "w2s"
cli.main()
"""


@pytest.mark.parametrize("asked", [False, True])
def test_a_writer_of_checkpoints_that_is_stopped(asked: bool, base: list[str], root: Path) -> None:
    run = root / f"writer-{asked}"
    options = [*base, "eval.shards=", "eval.knn_shards=", "tracking.enabled=false", f"run.name={run.name}", *ENDLESS]
    options += ["checkpoint.async_save=true", f"checkpoint.every={100000 if asked else 3}"]
    command = subprocess.Popen(
        [sys.executable, "-c", STOPPED_WRITER, "stage", "mim", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    wait_for(lambda: len(records(run)) >= 3, command)
    if asked:
        command.send_signal(signal.SIGTERM)
    processes = psutil.Process(command.pid).children(recursive=True)
    error = end(command, processes, within=SECONDS + 12)
    assert re.search(r"finishing a checkpoint: checkpoint writer \d+ is stopped by a signal", error)
    assert error.startswith("error: stopped by SIGTERM, nothing new was saved" if asked else "error: rank 0")
    assert checkpoint_folders.latest(run) is None
