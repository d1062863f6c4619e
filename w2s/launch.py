"""Running a stage on local ranks: one process each, one line of error for all of them.

Torch's elastic launcher starts ranks too, but it takes the failure that it finds first for the first failure, holds
only one exit code, and waits 30 s for ranks that lost a peer. Its restarts have no use here, where a repeated command
resumes.
"""

import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TypeVar

from w2s.config.sections import Config
from w2s.errors import StopRun, W2SError
from w2s.failure import describe

STOP_SECONDS = 60.0
"""Time that ranks have to save after SIGTERM or Ctrl-C."""
FAILURE_SECONDS = 10.0
"""Time that ranks have to end by themselves after another one failed."""

_POLL_SECONDS = 0.5

Argument = TypeVar("Argument")


class RankError(W2SError):
    """A rank failed.

    Attributes:
        exit_code: of the rank that failed first.
        rank_traceback: the traceback in that rank, empty when it died of a signal.
    """

    def __init__(self, message: str, exit_code: int, rank_traceback: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.rank_traceback = rank_traceback


@dataclass(frozen=True)
class _Failure:
    """What a rank leaves behind when it fails."""

    message: str
    exit_code: int
    expected: bool
    """Whether it is one of our errors: never the consequence of another rank's death."""
    signal_number: int
    """The signal of a StopRun, else 0."""
    time: float
    traceback: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "_Failure":
        message, exit_code = describe(error)
        expected = isinstance(error, W2SError)
        return cls(
            message=message if expected else f"rank {rank}: {message}",
            exit_code=exit_code,
            expected=expected,
            signal_number=error.signal_number if isinstance(error, StopRun) else 0,
            time=time.time(),
            traceback="".join(traceback.format_exception(error)),
        )

    def raise_(self) -> None:
        if self.signal_number:
            raise StopRun(self.message, self.signal_number)
        raise RankError(self.message, self.exit_code, self.traceback)


def run_stage(config: Config) -> None:
    """Run the stage of a configuration in this process, which is a rank."""
    importlib.import_module(f"stages.{config.stage}").run(config)


def is_rank() -> bool:
    """Whether torchrun or Slurm has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm() -> None:
    """Under `srun` with several tasks, set the variables that torchrun would set, unless they are there."""
    slurm = os.environ
    if is_rank() or int(slurm.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    first_host = re.sub(r"\[(\d+).*", r"\1", slurm["SLURM_STEP_NODELIST"]).partition(",")[0]
    os.environ.update(
        RANK=slurm["SLURM_PROCID"],
        WORLD_SIZE=slurm["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=slurm["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(len(slurm["SLURM_GTIDS"].split(","))),
        MASTER_ADDR=slurm.get("MASTER_ADDR", first_host),
        MASTER_PORT=slurm.get("MASTER_PORT", str(20_000 + int(slurm["SLURM_JOB_ID"]) % 20_000)),
    )


def launch(function: Callable[[Argument], None], argument: Argument, ranks: int) -> None:
    """Run `function(argument)` in `ranks` new processes and wait for them.

    SIGTERM and Ctrl-C go to all ranks once, which then have `STOP_SECONDS` to save; a second one kills them. When a
    rank fails, the others have `FAILURE_SECONDS`.

    Args:
        function: a function of a module, so that a new process can find it.
        argument: can be pickled.
        ranks: how many processes, at least 1.

    Raises:
        StopRun: the run was asked to stop.
        RankError: a rank failed; it carries the line of the rank whose failure caused those of the others.
    """
    from torch.distributed import TCPStore
    from torch.multiprocessing import start_processes

    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix="w2s-ranks-") as folder:
        with watch.signals():
            arguments = (function, argument, ranks, store.port, folder)
            watch.processes = start_processes(
                _rank, arguments, nprocs=ranks, join=False, start_method="spawn"
            ).processes
            watch.wait()
        watch.raise_failure(_read_failures(Path(folder)))


def _rank(
    rank: int, function: Callable[[Argument], None], argument: Argument, ranks: int, port: int, folder: str
) -> None:
    """The main function of a rank's process."""
    os.setsid()  # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # The store is the launcher's, as with torchrun: no rank has to open a port that was free a moment ago.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    try:
        function(argument)
    except (Exception, KeyboardInterrupt) as error:
        failure = _Failure.of(error, rank)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(asdict(failure)), encoding="utf-8")
        sys.exit(failure.exit_code)


def _read_failures(folder: Path) -> list[_Failure]:
    """What the ranks have left, the earliest first."""
    failures = [_Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return sorted(failures, key=lambda failure: failure.time)


class _Watch:
    """The launcher's view of its ranks."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self._signal: signal.Signals | None = None
        self._passed_on = False
        self._deadline = float("inf")
        self._killed: set[int] = set()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number)
        else:
            self._deadline = 0.0

    def wait(self) -> None:
        """Wait until no rank is left."""
        while alive := [process for process in self.processes if process.is_alive()]:
            if self._signal is not None and not self._passed_on:
                self._pass_on(self._signal, alive)
            elif self._signal is None and any(process.exitcode for process in self.processes):
                self._deadline = min(self._deadline, time.monotonic() + FAILURE_SECONDS)
            if time.monotonic() > self._deadline:
                self._kill()
            connection.wait([process.sentinel for process in alive], timeout=_POLL_SECONDS)

    def _pass_on(self, number: signal.Signals, alive: list[BaseProcess]) -> None:
        self._passed_on = True
        self._deadline = min(self._deadline, time.monotonic() + STOP_SECONDS)
        for process in alive:
            if process.pid is not None:
                os.kill(process.pid, number)

    def _kill(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.is_alive():
                self._killed.add(rank)
                process.kill()

    def raise_failure(self, failures: list[_Failure]) -> None:
        """Raise what caused the end, if the ranks did not all end well.

        An error of ours comes first, since it never follows from another rank's death; then a rank that died of a
        signal, which left no word; then the earliest of the other errors, most of which are lost connections.
        """
        for failure in failures:
            if failure.expected:
                failure.raise_()
        if self._signal is not None:
            outcome = "did not save in time" if self._killed else "had nothing to save"
            raise StopRun(f"stopped by {self._signal.name}: the ranks {outcome}", self._signal)
        for rank, process in enumerate(self.processes):
            code = process.exitcode or 0
            if code < 0 and rank not in self._killed:
                name = signal.Signals(-code).name
                raise RankError(
                    f"rank {rank} was killed by {name}: see the system's log, often for memory", 128 - code, ""
                )
        for failure in failures:
            failure.raise_()
        for rank, process in enumerate(self.processes):
            if process.exitcode:
                raise RankError(f"rank {rank} ended with exit code {process.exitcode}", process.exitcode, "")
