"""When a run stalls, who holds it up, and what the user is told. The standard library alone is imported here."""

import signal
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

STOP_SECONDS = 20.0
"""How long a run that was asked to stop waits for a helper process without a sign of life."""

Condition = Literal["runs", "stopped", "silent", "dead", "lost"]
"""`stopped` by a signal; `silent`: its process runs and tells nothing; `lost`: nothing is known of its watcher."""

HOPELESS: tuple[Condition, ...] = ("stopped", "dead")
"""Conditions out of which nobody comes by working on."""
_WHY: dict[Condition, str] = {
    "stopped": "it is stopped by a signal (SIGSTOP) and does not answer",
    "silent": "it does not answer",
    "dead": "it is dead, see the system's log, often for memory",
    "lost": "its machine does not answer, or its watcher is dead",
}


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What is known of a rank."""

    rank: int
    host: str
    pid: int
    condition: Condition = "runs"
    place: int = 0
    """Phases that its training thread has entered; all ranks enter the same ones in the same order."""
    step: int = 0
    """Optimizer step that it works on, from 1; 0 outside of the steps."""
    doing: str = "starting"
    """The phase, as a participle."""
    age: float = 0.0
    """Seconds without a sign of life."""
    limit: float = 0.0
    """Seconds that it may be without one here."""
    lost_limit: float = 0.0
    """Seconds that its watcher may be unheard of, which beats whatever the rank does."""
    awaits: str = ""
    """Kind of the helper processes that it waits for here, if it does."""
    helpers: str = ""
    """Which of these do nothing."""
    signal: int = 0
    """The signal that has asked it to stop."""
    frame: str = ""
    """Where its training thread is in our code."""
    in_collective: bool = False
    """Whether it waits there for other ranks."""
    report: str = ""
    """File for the stacks of all ranks."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a run is ended."""

    by: int
    """Rank whose watcher has decided."""
    message: str
    signal: int
    """The signal that had asked for it, if one had."""
    stacks: str = ""
    """What all training threads were doing."""

    @property
    def exit_code(self) -> int:
        """As the shell has it after a signal, else 1."""
        return 128 + self.signal if self.signal else 1


def is_stalled(statuses: Collection[RankStatus]) -> bool:
    """Whether the ranks that are furthest behind, for which all others wait, have been too long without a sign of life.

    A rank that is further may be waiting for one that evaluates or saves: that one is the measure. One that is stopped
    or dead for too long is enough by itself.
    """
    if any(status.condition in HOPELESS and status.age > status.limit for status in statuses):
        return True
    behind = min(status.place for status in statuses)
    asked = any(status.signal for status in statuses)
    return all(status.age > _limit(status, asked) for status in statuses if status.place == behind)


def _limit(status: RankStatus, asked_to_stop: bool) -> float:
    return min(status.limit, STOP_SECONDS) if asked_to_stop and status.awaits else status.limit


def first_failed(statuses: Iterable[RankStatus]) -> RankStatus:
    """The rank that holds the others up.

    One that cannot continue comes first, then one whose helper process does not, then the one that is furthest behind;
    of several, one that does not wait for others.
    """
    return min(statuses, key=_innocence)


def _innocence(status: RankStatus) -> tuple[bool, bool, int, bool, float]:
    return status.condition == "runs", not status.helpers, status.place, status.in_collective, -status.age


def message(status: RankStatus, asked_by: int, report: str) -> str:
    """The line for the user.

    Args:
        status: of the rank that failed first.
        asked_by: the signal that had asked the run to stop; 0 if none had.
        report: file with the Python stacks of all ranks, if there is one.
    """
    why = (
        _WHY.get(status.condition)
        or status.helpers
        or (f"in {status.frame}" if status.frame else "it is alive and does nothing")
    )
    where = f"at step {status.step}, {status.doing}" if status.step else status.doing
    who = f"rank {status.rank} on {status.host} (process {status.pid})"
    still = f"{who} has been stalled for {status.age:.0f} s {where}: {why}"
    begin = f"stopped by {signal.Signals(asked_by).name}, nothing new was saved, as " if asked_by else ""
    stacks = f"; stacks of all ranks are in {report}" if report else ""
    return f"{begin}{still}: repeat the command to resume from the last checkpoint{stacks}"
