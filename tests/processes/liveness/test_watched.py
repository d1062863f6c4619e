"""Ranks that stand still, beside their watchers: who is named, and that all end in time."""

import json
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
import torch

from tests.distributed import RankError, run_ranks
from tests.running import running_after, runs
from w2s.config.sections import HardwareConfig, ParallelConfig
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.failure import FAILURE_FILE
from w2s.processes.liveness.heartbeat import READERS, Heartbeat
from w2s.processes.liveness.heartbeat_sender import watched

SECONDS = 2
"""`hardware.timeout` of these runs."""


Act = Callable[[Ranks, Heartbeat], None]


def watch(folder: Path, act: Act) -> None:
    """Be watched in some steps of which `act` is the third."""
    os.environ["MASTER_ADDR"] = "localhost"
    with process_groups.initialize_groups(ParallelConfig(), torch.device("cpu")) as ranks:
        os.environ[FAILURE_FILE] = str(folder / f"{ranks.rank}.json")
        hardware = HardwareConfig()
        vars(hardware).update(timeout=SECONDS, slow_timeout=3 * SECONDS)  # less than a run may have
        with watched(hardware, ranks) as heartbeat:
            heartbeat.report = folder / "stacks.txt"
            for step in range(1, 5):
                heartbeat.at("training", step)
                if step == 3:
                    (folder / f"{ranks.rank}.at").write_text(str(time.time()))
                    act(ranks, heartbeat)
                ranks.barrier()


def stop(ranks: Ranks, heartbeat: Heartbeat) -> None:
    """Rank 1 is stopped, rank 0 waits for it."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_the_main_rank(ranks: Ranks, heartbeat: Heartbeat) -> None:
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def hang(ranks: Ranks, heartbeat: Heartbeat) -> None:
    if ranks.rank == 1:
        time.sleep(600)


def wait_for_a_stopped_reader(ranks: Ranks, heartbeat: Heartbeat) -> None:
    """Rank 1 looks again and again whether the process that it waits for has ended, and that one is stopped."""
    heartbeat.at("waiting for samples", 3, awaits=READERS)
    if ranks.rank == 1:
        reader = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
        reader.send_signal(signal.SIGSTOP)
        heartbeat.helpers[READERS] = lambda: [reader.pid]
        Path(os.environ[FAILURE_FILE]).with_name("reader").write_text(str(reader.pid))
        while reader.poll() is None:
            time.sleep(0.01)


def die(ranks: Ranks, heartbeat: Heartbeat) -> None:
    """Rank 1 is killed, rank 0 waits for what does not tell it so, and nothing asks it to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def evaluate_for_long(ranks: Ranks, heartbeat: Heartbeat) -> None:
    """Longer than a rank may stall; rank 0 is done with it at once and waits."""
    heartbeat.at("evaluating", 3, long=True)
    if ranks.rank == 1:
        time.sleep(SECONDS + 2)
    heartbeat.at("training", 3)


CASES = {
    stop: "rank 1 .* at step 3, training: it is stopped by a signal",
    stop_the_main_rank: "rank 0 .* at step 3, training: it is stopped by a signal",
    hang: r"rank 1 .* at step 3, training: in hang \(tests/processes/liveness/test_watched.py:\d+\)",
    wait_for_a_stopped_reader: "rank 1 .* at step 3, waiting for samples: reading process {reader} is stopped",
    die: "rank 1 .* at step 3, training: it is dead",
}


@pytest.mark.parametrize(
    "act",
    [
        stop,
        wait_for_a_stopped_reader,
        *(pytest.param(act, marks=pytest.mark.slow) for act in (stop_the_main_rank, hang, die)),
    ],
)
def test_a_rank_that_stands_still_is_named_and_all_end(act: Act, tmp_path: Path) -> None:
    with pytest.raises(RankError):
        run_ranks(watch, 2, tmp_path, act)
    begun = max(float(path.read_text()) for path in tmp_path.glob("*.at"))
    files = sorted(tmp_path.glob("*.json"))
    assert max(path.stat().st_mtime for path in files) - begun < SECONDS + 10
    told = [json.loads(path.read_text()) for path in files]
    reader = tmp_path / "reader"
    expected = CASES[act].format(reader=reader.read_text() if reader.exists() else "")
    for failure in told:
        assert re.fullmatch(
            rf"{expected}.*: repeat the command to resume from the last checkpoint; stacks .* in {tmp_path}/stacks.txt",
            failure["message"],
        )
        assert (failure["exit_code"], failure["expected"]) == (1, True)
    assert told
    assert "in watch\n" in (tmp_path / "stacks.txt").read_text(), "the stack of a rank that answers"
    if reader.exists():
        left = [process for process in psutil.process_iter() if process.pid == int(reader.read_text())]
        assert not running_after(left, SECONDS)


def _wait(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_a_long_phase_is_no_standing_still(tmp_path: Path) -> None:
    run_ranks(watch, 2, tmp_path, evaluate_for_long)
    assert not list(tmp_path.glob("*.json"))


def test_no_watcher_stays(alone: Ranks) -> None:
    before = set(psutil.Process().children())
    with watched(HardwareConfig(), alone):
        (watcher,) = set(psutil.Process().children()) - before
        assert watcher.memory_info().rss < 64 * 2**20, "it imports no torch"
    assert not watcher.is_running()


def test_a_stop_signal_for_the_whole_group_leaves_the_watcher_alone(alone: Ranks) -> None:
    before = set(psutil.Process().children())
    with watched(HardwareConfig(), alone):
        (watcher,) = set(psutil.Process().children()) - before
        for number in (signal.SIGINT, signal.SIGTERM):
            watcher.send_signal(number)
        _wait(lambda: _pending(watcher.pid) == {signal.SIGINT, signal.SIGTERM})
        assert runs(watcher)


def _pending(pid: int) -> set[signal.Signals]:
    """The signals that a process has been sent and has blocked."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd")]
    mask = int(line.split()[1], 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}
