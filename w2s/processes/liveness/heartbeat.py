"""What the training thread of a rank is doing: it notes that here, and others read it. The standard library alone."""

import mmap
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

READERS = "reading process"
WRITER = "checkpoint writer"
"""Kinds of helper processes, as the user reads them."""


@dataclass(frozen=True)
class Phase:
    """A phase of the training thread."""

    number: int = 0
    """Phases entered before it."""
    step: int = 0
    """Optimizer step that is worked on, from 1; 0 outside of the steps."""
    doing: str = "starting"
    """What is done, as a participle."""
    awaits: str = ""
    """Kind of the helper processes that are waited for."""
    long: bool = True
    """Whether one call may take long here, as a compilation or the writing of a large file does."""


class Board:
    """A phase in memory that two processes share, so that it can be read of one that is stopped or dead.

    Args:
        descriptor: of a file of `Board.SIZE` bytes that both have open.
    """

    _LAYOUT = struct.Struct("<QQ?32s32s")
    SIZE = _LAYOUT.size

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def write(self, phase: Phase) -> None:
        """Note a phase."""
        texts = phase.doing.encode(), phase.awaits.encode()
        self._LAYOUT.pack_into(self._memory, 0, phase.number, phase.step, phase.long, *texts)

    def read(self) -> Phase:
        """The phase that was noted last."""
        number, step, long, doing, awaits = self._LAYOUT.unpack_from(self._memory)
        return Phase(number, step, doing.rstrip(b"\0").decode(), awaits.rstrip(b"\0").decode(), long)


class Heartbeat:
    """The phase that a training thread is in. Entering one costs microseconds and waits for nothing.

    Args:
        board: where a watcher reads it, if there is one.

    Attributes:
        phase: the phase. All ranks enter the same phases in the same order: the one that has entered the fewest is
            the one that the others wait for.
        helpers: kind of helper processes to a function that returns the ids of those that run.
        signals: signals that have asked the run to stop.
        report: file for the Python stacks of all ranks, when they stall.
    """

    def __init__(self, board: Board | None = None) -> None:
        self._board = board
        self._enter(Phase())
        self.helpers: dict[str, Callable[[], Collection[int]]] = {}
        self.signals: Sequence[int] = ()
        self.report: Path | None = None

    def at(self, doing: str, step: int = 0, *, awaits: str = "", long: bool = False) -> None:
        """Enter a phase; every rank does."""
        self._enter(Phase(self.phase.number + 1, step, doing, awaits, long))

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        if self._board is not None:
            self._board.write(phase)

    def awaited(self) -> Collection[int]:
        """Ids of the helper processes that this phase waits for."""
        return self.helpers[self.phase.awaits]() if self.phase.awaits in self.helpers else ()

    def all_helpers(self) -> list[int]:
        """Ids of all helper processes."""
        return [pid for running in list(self.helpers.values()) for pid in running()]
