"""Signs of life of a training thread, and of the helper processes that it waits for."""

import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

import w2s
from w2s.processes.liveness.heartbeat import Heartbeat

_ROOT = Path(w2s.__file__).parent.parent
_WAITING = ("/torch/distributed/", "/megatron/core/distributed/", "/megatron/core/pipeline_parallel/")
"""Code that waits for other ranks."""
_TICK_SECONDS = 0.02
_IDLE_SHARE = 0.01
"""A helper that uses less of a core only looks now and then whether there is something to do."""


@dataclass(frozen=True)
class _Work:
    """What some processes have done so far."""

    bytes: int
    seconds: float
    """On a core."""

    @classmethod
    def of(cls, processes: Collection[psutil.Process]) -> "_Work":
        counters = [process.io_counters() for process in processes if hasattr(process, "io_counters")]
        times = [process.cpu_times() for process in processes]
        return cls(
            bytes=sum(each.read_chars + each.write_chars for each in counters),
            seconds=sum(each.user + each.system for each in times),
        )


class Signs:
    """Counts the signs of life of a training thread.

    It lives while it moves through its Python code: looked at twice, it is at another place, or in another phase. So a
    step of an hour is not a stall, and a call that never returns is. While it waits for helper processes, which
    it may do in a loop, theirs count instead: that they read, write or compute.

    Args:
        heartbeat: of the thread.
        thread: its number.
        clock: seconds that only ever grow.

    Attributes:
        count: signs so far.
    """

    def __init__(self, heartbeat: Heartbeat, thread: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._heartbeat, self._thread, self._clock = heartbeat, thread, clock
        self._seen: Any = None
        self._work, self._at = _Work(0, 0.0), clock()
        self.count = 0

    def look(self) -> None:
        """Look again."""
        with suppress(psutil.Error):  # one ended just now: the next look is without it
            helpers = list(_living(self._heartbeat.awaited()))
            work, ids = _Work.of(helpers), [helper.pid for helper in helpers]
            seen = (self._heartbeat.phase.number, len(self._heartbeat.signals), ids or _places(self._frame()))
            if seen != self._seen or self._has_worked(work):
                self._seen, self._work, self._at = seen, work, self._clock()
                self.count += 1

    def _has_worked(self, work: _Work) -> bool:
        idle = _TICK_SECONDS + _IDLE_SHARE * (self._clock() - self._at)
        return work.bytes != self._work.bytes or work.seconds - self._work.seconds > idle

    def helpers(self) -> str:
        """Tell of the helpers that are waited for which of them do nothing; empty without any."""
        with suppress(psutil.Error):
            helpers = list(_living(self._heartbeat.awaited()))
            stopped = [process for process in helpers if process.status() == psutil.STATUS_STOPPED]
            if helpers:
                names = ", ".join(f"{self._heartbeat.phase.awaits} {process.pid}" for process in stopped or helpers)
                return f"{names} {'is stopped by a signal (SIGSTOP)' if stopped else 'gives no sign of life'}"
        return ""

    def stack(self) -> str:
        """The Python stack of the thread, outermost call first."""
        return "".join(traceback.format_stack(self._frame()))

    def place(self) -> str:
        """The innermost call in our own code, otherwise of all: function, file and line."""
        calls = list(traceback.walk_stack(self._frame()))
        ours = [call for call in calls if _path(call[0]).is_relative_to(_ROOT / "w2s")]
        frame, line = (ours or calls)[0]
        path = _path(frame)
        shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
        return f"{frame.f_code.co_qualname} ({shown}:{line})"

    def in_collective(self) -> bool:
        """Whether the thread waits for other ranks, as far as its innermost call tells."""
        path = _path(self._frame()).as_posix()
        return any(part in path for part in _WAITING)

    def _frame(self) -> FrameType:
        return sys._current_frames()[self._thread]


def _living(pids: Collection[int]) -> Iterator[psutil.Process]:
    """The processes and all below them; a writer of checkpoints has others write."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            yield from (each for each in family if each.status() != psutil.STATUS_ZOMBIE)


def _path(frame: FrameType) -> Path:
    return Path(frame.f_code.co_filename)


def _places(frame: FrameType) -> list[tuple[int, int]]:
    """Where each of the calls stands: its code and the instruction."""
    return [(id(each.f_code), each.f_lasti) for each, _ in traceback.walk_stack(frame)]
