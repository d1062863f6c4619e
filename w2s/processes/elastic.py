"""A function on local ranks: torch's elastic launcher, and one line of error for all of them."""

import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from w2s.errors import StopRun, UserError, W2SError
from w2s.files import write_text
from w2s.processes.cleanup import in_memory, mark, sweep, temporary
from w2s.processes.failure import FAILURE_FILE, Failure, describe
from w2s.processes.forks import start_fork_server
from w2s.processes.stopping import SIGNALS, stop_with_parent
from w2s.redaction import redact

_MONITOR_SECONDS = 0.1
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable of torch's agent: 1 lets ranks that are started again meet in a new store, not in one that still
has the addresses of dead ranks."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What the elastic agent passes on to the ranks."""
_WARM = ("w2s.stages.mim", "w2s.stages.clip", "w2s.stages.eval", "torch._dynamo")
"""What a rank imports."""

Argument = TypeVar("Argument")


class RankError(W2SError):
    """A rank failed.

    Attributes:
        exit_code: of the rank whose failure caused those of the others.
        rank_traceback: the traceback in that rank, empty when it left none.
    """

    def __init__(self, message: str, exit_code: int, rank_traceback: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.rank_traceback = rank_traceback


def _failure(error: BaseException, rank: str) -> Failure:
    message, exit_code = describe(error)
    expected = isinstance(error, W2SError)
    return Failure(
        message=message if expected else f"rank {rank}: {message}",
        exit_code=exit_code,
        expected=expected,
        signal_number=error.signal_number if isinstance(error, StopRun) else 0,
        traceback=redact("".join(traceback.format_exception(error))),
    )


def _error(failure: Failure) -> W2SError:
    if failure.signal_number:
        return StopRun(failure.message, failure.signal_number)
    return RankError(failure.message, failure.exit_code, failure.traceback)


def is_rank() -> bool:
    """Whether torchrun or Slurm has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_torchrun() -> None:
    """Refuse ranks of torchrun that could not be started again.

    Raises:
        UserError: they would look for one another at the addresses of dead ranks, and hang.
    """
    restarts, kept = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
    if int(restarts or 0) and kept == "True":
        raise UserError(f"torchrun --max-restarts {restarts} with ranks that meet in its own store: set {NEW_STORE}=1")


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


def _prepare_starts() -> str:
    """Begin to prepare for ranks, and return torch's start method for them.

    Without a GPU they are forked from a server that has imported what they need and stays for the ranks to come; a
    driver of CUDA that a library has touched while it was imported would not survive that.
    """
    if torch.cuda.is_available():
        return "spawn"
    start_fork_server(_WARM)
    return "forkserver"


def launch(function: Callable[[Argument], None], argument: Argument, ranks: int, restarts: int = 0) -> None:
    """Run `function(argument)` in `ranks` new processes and wait for them.

    The elastic agent passes SIGTERM and Ctrl-C on to the ranks, which then have 30 s (the environment variable
    `TORCH_ELASTIC_SHUTDOWN_TIMEOUT`) to save before it kills them. When a rank fails, the others get SIGTERM and 30 s.

    Args:
        function: a function of a module, so that a new process can find it.
        argument: can be pickled.
        ranks: how many processes, at least 1.
        restarts: times that all ranks are started again when one has failed; a user's mistake stays one.

    Raises:
        StopRun: the run was asked to stop.
        RankError: a rank failed; it carries the line of the rank whose failure caused those of the others.
    """
    os.environ.setdefault(NEW_STORE, "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    with tempfile.TemporaryDirectory(prefix=mark()) as folder, _own_signals_and_no_log():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="w2s",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=restarts,
            monitor_interval=_MONITOR_SECONDS,
            start_method=_prepare_starts(),
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, _rank)(function, argument, dict(os.environ), Path(folder))
        except (SignalException, ChildFailedError) as end:
            raise _cause(_read_failures(_last_attempt(Path(folder))), end) from None
        finally:
            sweep(temporary())
            shutil.rmtree(in_memory(os.getpid()), ignore_errors=True)


def _last_attempt(folder: Path) -> Path:
    """Where the ranks have left word: each time that they are started they have a folder of their own."""
    return max(folder.glob("attempt-*"), key=lambda path: int(path.name.partition("-")[2]), default=folder)


def _rank(
    function: Callable[[Argument], None], argument: Argument, environment: Mapping[str, str], folder: Path
) -> None:
    """The main function of a rank's process, which has the environment of the server that it was forked from."""
    os.environ.update(environment)
    stop_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    path = folder / f"attempt-{attempt}" / f"{rank}.json"
    path.parent.mkdir(exist_ok=True)
    os.environ[FAILURE_FILE] = str(path)
    try:
        if attempt != "0":
            before, most = folder / f"attempt-{int(attempt) - 1}", os.environ["TORCHELASTIC_MAX_RESTARTS"]
            _look_back(before, f"{attempt} of {most}")
        function(argument)
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure(error, rank)
        write_text(path, json.dumps(asdict(failure)))
        if not failure.expected:
            # It may be a connection to a rank that a signal killed: let the agent find that one first.
            time.sleep(2 * _MONITOR_SECONDS)
        sys.exit(failure.exit_code)


def _look_back(before: Path, restart: str) -> None:
    """Tell why the ranks are started again.

    Raises:
        RankError: a user's mistake, which would be the same one again.
    """
    failures = [failure for failure in _read_failures(before) if not failure.signal_number]
    for failure in failures:
        if failure.exit_code == UserError.exit_code:
            raise _error(failure)
    if os.environ["RANK"] == "0":
        killed = len(failures) < int(os.environ["WORLD_SIZE"])
        lost = "a rank was killed" if killed else failures[0].message
        why = next((failure.message for failure in failures if failure.expected), lost)
        print(f"note: {why}; all ranks are started again ({restart})", flush=True)


@contextmanager
def _own_signals_and_no_log() -> Iterator[None]:
    """Give the signal handlers back that the agent replaces, and keep its log lines from the user's terminal."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logging.NullHandler()], False
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _read_failures(folder: Path) -> list[Failure]:
    """What the ranks have left, the earliest first."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _cause(failures: list[Failure], end: SignalException | ChildFailedError) -> W2SError:
    """Why the ranks ended.

    An error of ours never follows from another rank's death. Next comes a request to stop this process, then a rank
    that died of a signal, which left no word, then the earliest of the others: most are lost connections, or ranks that
    the agent asked to stop because of the first.
    """
    errors = [failure for failure in failures if failure.expected and not failure.signal_number]
    stops = [failure for failure in failures if failure.signal_number]
    if errors:
        return _error(errors[0])
    if isinstance(end, SignalException):
        name, number = end.sigval.name, end.sigval
        nothing = StopRun(f"stopped by {name}, nothing new was saved: repeat the command", number)
        return _error(stops[0]) if stops else nothing
    rank, first = end.get_first_failure()
    if first.exitcode < 0:
        message = f"rank {rank} was killed by {first.signal_name()}: see the system's log, often for memory"
        return RankError(message, 128 - first.exitcode)
    if failures:
        return _error(failures[0])
    return RankError(f"rank {rank} ended with exit code {first.exitcode}", first.exitcode)
