"""The process that watches one rank. The standard library is all that it imports beside what lies here."""

import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from w2s.errors import UserError
from w2s.files import write_text
from w2s.processes.cleanup import sweep
from w2s.processes.failure import Failure
from w2s.processes.liveness.heartbeat import Board, Phase
from w2s.processes.liveness.monitor import Hub, Spoke
from w2s.processes.liveness.verdict import HOPELESS, Condition, RankStatus, Verdict

_LOOK_SECONDS = 1.0
_PAUSE_SECONDS = 5.0
"""A look that takes so long is a pause of this process itself: Ctrl-Z, or a machine that has other things to do."""
_SILENT_SECONDS = 5.0
"""Without a beat for so long a rank is silent."""
_END_SECONDS = 2.0
"""How long a rank has to end by itself, and the others to learn the verdict."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a watcher is told at its start."""

    rank: int
    world_size: int
    pid: int
    """The rank's process, this one's parent."""
    timeout: float
    slow_timeout: float
    hub: tuple[str, int]
    """Host and port of rank 0's watcher."""
    token: str
    """What the watchers of a run know and others do not."""
    board: int
    """Descriptor of the shared memory with the rank's phase."""
    listener: int | None
    """Rank 0's listening socket, if there are other ranks."""
    failure_file: str
    """Where to leave word for the launcher; empty: on the terminal."""
    temporary: str
    """The system's folder of temporary files."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank tells once a second."""

    count: int = 0
    """Signs of life."""
    signal: int = 0
    """That has asked the run to stop."""
    helpers: str = ""
    """Helper processes that are waited for, if some are, and how they are."""
    pids: tuple[int, ...] = ()
    """Of all helper processes."""
    report: str = ""
    """File for the stacks of all ranks."""
    stack: str = ""
    """Python stack of the training thread, where it was asked for."""
    frame: str = ""
    """Its innermost call in our code."""
    in_collective: bool = False
    """Whether it waits there for other ranks."""


class Watcher:
    """Follows the beats of a rank, and ends it where the hub says so."""

    def __init__(self, setup: Setup, clock: Callable[[], float] = time.monotonic) -> None:
        self._setup, self._clock = setup, clock
        self._board = Board(setup.board)
        self._beat, self._phase, self._left = Beat(), Phase(), ""
        self._told = Beat()  # the last one that had a stack, while there is no sign of life
        self._sign_at = self._beat_at = self._since = clock()
        self._was: Condition = "runs"
        self._host = socket.gethostname()
        listener = None if setup.listener is None else socket.socket(fileno=setup.listener)
        self._desk = (
            Spoke(setup.hub, setup.token, setup.slow_timeout)
            if setup.rank
            else Hub(setup.world_size, setup.slow_timeout, listener, setup.token)
        )

    def follow(self, lines: list[str]) -> None:
        """Take beats, the oldest first."""
        for line in lines:
            content = json.loads(line)
            self._beat_at = self._clock()
            if "end" in content:
                self._left = content["end"]
                continue
            before, self._beat = self._beat, Beat(**content)
            if self._beat.count != before.count:
                self._sign_at, self._told = self._beat_at, Beat()
            if self._beat.stack:
                self._told = self._beat

    def status(self) -> RankStatus:
        """What is known of the rank now."""
        beat, setup, condition, now = self._beat, self._setup, self._condition(), self._clock()
        before, phase = self._phase, self._board.read()
        if phase != before:
            self._phase, self._sign_at = phase, now
        if condition != self._was:
            self._was, self._since = condition, now
        hopeless = condition in HOPELESS
        slow = phase.long and not beat.helpers and not hopeless
        return RankStatus(
            rank=setup.rank,
            host=self._host,
            pid=setup.pid,
            condition=condition,
            place=phase.number,
            step=phase.step,
            doing=phase.doing,
            age=now - (self._since if hopeless else self._sign_at),
            limit=setup.slow_timeout if slow else setup.timeout,
            lost_limit=setup.timeout,
            awaits=phase.awaits,
            helpers=beat.helpers,
            signal=beat.signal,
            frame=self._told.frame,
            in_collective=self._told.in_collective,
            report=beat.report,
        )

    def _condition(self) -> Condition:
        if self._left == "failed" or self._gone():
            return "dead"
        if is_stopped(self._setup.pid):
            return "stopped"
        return "silent" if self._clock() - self._beat_at > _SILENT_SECONDS else "runs"

    def _gone(self) -> bool:
        return os.getppid() != self._setup.pid

    def watch(self, lines: "Lines") -> None:
        """Watch until the rank ends or is ended."""
        while True:
            begun = self._clock()
            told = lines.read(_LOOK_SECONDS)
            pause = self._clock() - begun
            self.follow(told)
            if pause > _PAUSE_SECONDS:
                self._sign_at, self._beat_at, self._since = (
                    at + pause for at in (self._sign_at, self._beat_at, self._since)
                )
                self._desk.forgive(pause)
            if self._left == "done":
                self._desk.leave(self._setup.rank)
                return
            status = self.status()
            answer = self._desk.tell(status, self._told.stack)
            if answer.verdict is not None:
                self._end(answer.verdict)
                return
            if self._gone():
                self._kill_helpers()
                if not self._desk.others():
                    self._sweep()
                    return
            elif answer.asks_for_stack:
                self._command("stack")

    def _end(self, verdict: Verdict) -> None:
        """Leave word, let the rank end by itself, and see to it that it does."""
        _leave_word(self._setup, verdict)
        if not is_stopped(self._setup.pid):
            self._command(f"end {verdict.exit_code}")
            self._wait(self._gone)
        if not self._gone():
            _kill(self._setup.pid)
        self._kill_helpers()
        self._wait(lambda: not self._desk.others())
        self._sweep()

    def _sweep(self) -> None:
        """Remove what the rank has left; one whose exit code nobody has asked for is still there."""
        self._wait(lambda: not Path(f"/proc/{self._setup.pid}").exists())
        sweep(Path(self._setup.temporary))

    def _command(self, command: str) -> None:
        with suppress(OSError):
            os.write(sys.stdout.fileno(), f"{command}\n".encode())

    def _wait(self, done: Callable[[], bool]) -> None:
        end = self._clock() + _END_SECONDS
        while not done() and self._clock() < end:
            time.sleep(0.05)

    def _kill_helpers(self) -> None:
        for pid in [pid for helper in self._beat.pids for pid in family(helper)]:
            _kill(pid)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Lines:
    """Whole lines from a pipe.

    Attributes:
        open: whether more may come.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""
        self.open = True

    def read(self, seconds: float) -> list[str]:
        """What has come after at most so many seconds."""
        if not self.open:
            time.sleep(seconds)
            return []
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        data = os.read(self._descriptor, 1 << 16) if readable else b""
        self.open = bool(data) or not readable
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode() for line in lines]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger; only Linux tells."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return about.rpartition(")")[2].split()[0] in "Tt"


def family(pid: int) -> list[int]:
    """A process and all below it; only Linux tells."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        children = []
    return [pid, *(each for child in children for each in family(int(child)))]


def _leave_word(setup: Setup, verdict: Verdict) -> None:
    """For the launcher, which has a line for all ranks; else on the terminal, by the one that has decided."""
    if setup.failure_file:
        failure = Failure(verdict.message, verdict.exit_code, True, verdict.signal, verdict.stacks)
        with suppress(UserError):  # the disk is full: the launcher says that the ranks have died
            write_text(Path(setup.failure_file), json.dumps(asdict(failure)))
    elif verdict.by == setup.rank:
        print(f"error: {verdict.message}", file=sys.stderr)


def main() -> None:
    """Watch the parent process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # rank 0 has a connection to every other one
    lines = Lines(sys.stdin.fileno())
    while not (told := lines.read(_LOOK_SECONDS)):
        if not lines.open:
            return
    watcher = Watcher(Setup(**json.loads(told[0])))
    watcher.follow(told[1:])
    watcher.watch(lines)
