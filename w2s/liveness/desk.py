"""Where the watchers of all ranks tell what they know and learn how the run ends: at the one of rank 0."""

import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from w2s.liveness.verdict import Row, Verdict, culprit, message, stands_still

LOST_SECONDS = 10.0
"""Without a word for so long a watcher is lost."""
_ASK_SECONDS = 3.0
"""How long the ranks have to tell where they stand before a run that stands still is ended."""
_CALL_SECONDS = 5.0


@dataclass(frozen=True)
class Answer:
    """What a watcher learns."""

    verdict: Verdict | None = None
    asks_for_stack: bool = False

    @classmethod
    def read(cls, line: str) -> "Answer":
        """From a line of JSON."""
        content = json.loads(line)
        verdict = content["verdict"]
        return cls(Verdict(**verdict) if verdict else None, content["asks_for_stack"])


class Hub:
    """Keeps a row of every rank, and decides.

    Args:
        world_size: number of ranks.
        slow_timeout: limit of every rank as long as some have never been heard of: nobody knows what they do.
        listener: socket on which the other watchers call; None without any.
        token: what they say first.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        world_size: int,
        slow_timeout: float,
        listener: socket.socket | None,
        token: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._world_size, self._slow_timeout, self._token, self._clock = world_size, slow_timeout, token, clock
        self._lock = threading.Lock()
        self._rows: dict[int, tuple[Row, float]] = {}
        self._stacks: dict[int, str] = {}
        self._known: set[int] = set()
        self._told: set[int] = set()
        self._asked_at: float | None = None
        self._verdict: Verdict | None = None
        if listener is not None:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def tell(self, row: Row, stack: str) -> Answer:
        """Take a rank's row, and decide."""
        with self._lock:
            self._take(row, stack)
            self._judge()
            return self._answer(row.rank)

    def leave(self, rank: int) -> None:
        """Forget a rank that is done."""
        with self._lock:
            self._rows.pop(rank, None)

    def forgive(self, seconds: float) -> None:
        """Count a pause of this process, in which nobody could be heard, for nobody."""
        with self._lock:
            self._rows = {rank: (row, at + seconds) for rank, (row, at) in self._rows.items()}

    def others(self) -> bool:
        """Whether ranks beside rank 0 still run and do not know the verdict."""
        with self._lock:
            now = {row.rank for row in self._current() if row.condition not in ("dead", "lost")}
            return bool(now - self._told - {0})

    def _take(self, row: Row, stack: str) -> None:
        self._known.add(row.rank)
        self._rows[row.rank] = row, self._clock()
        if stack:
            self._stacks[row.rank] = stack

    def _answer(self, rank: int) -> Answer:
        if self._verdict is not None:
            self._told.add(rank)
        return Answer(self._verdict, self._asked_at is not None and rank not in self._stacks)

    def _current(self) -> list[Row]:
        now, everyone = self._clock(), len(self._known) == self._world_size
        rows = []
        for row, at in self._rows.values():
            row = replace(row, age=row.age + now - at)
            if now - at > LOST_SECONDS and row.condition != "dead":
                row = replace(row, condition="lost", age=now - at, limit=row.lost_limit)
            rows.append(row if everyone else replace(row, limit=max(row.limit, self._slow_timeout)))
        return rows

    def _judge(self) -> None:
        rows = self._current()
        if self._verdict is not None:
            return
        if not stands_still(rows):
            self._asked_at = None
            self._stacks.clear()
        elif self._asked_at is None:
            self._asked_at = self._clock()
        elif self._clock() - self._asked_at > _ASK_SECONDS or self._all_answered(rows):
            self._verdict = decide(0, rows, self._stacks)

    def _all_answered(self, rows: list[Row]) -> bool:
        return all(row.rank in self._stacks for row in rows if row.condition == "runs")

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it is closed
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rw", encoding="utf-8") as file:
                connection.settimeout(LOST_SECONDS)
                if not hmac.compare_digest(file.readline(1000).strip().encode(), self._token.encode()):
                    return
                for line in file:
                    content = json.loads(line)
                    if content["row"] is None:
                        self.leave(content["rank"])
                        return
                    row = Row(**content["row"])
                    with self._lock:
                        self._take(row, content["stack"])
                        answer = self._answer(row.rank)
                    print(json.dumps(asdict(answer)), file=file, flush=True)
        except (OSError, ValueError):
            return  # it is lost, or calls again


class Spoke:
    """Tells the hub of one other rank; without the hub it decides alone.

    Args:
        address: host and port of the hub.
        token: what is said first.
        slow_timeout: limit as long as the hub has never been heard of: a network may have no way to it.
    """

    def __init__(self, address: tuple[str, int], token: str, slow_timeout: float) -> None:
        self._address, self._token, self._slow_timeout = address, token, slow_timeout
        self._file: TextIO | None = None
        self._heard = False

    def tell(self, row: Row, stack: str) -> Answer:
        """Take the rank's row to the hub, and bring its answer back."""
        try:
            answer = self._call({"row": asdict(row), "stack": stack})
        except (OSError, ValueError):
            self._hang_up()
            return self._alone(row, stack)
        self._heard = True
        return answer

    def leave(self, rank: int) -> None:
        """Say that a rank is done."""
        with suppress(OSError, ValueError):
            self._call({"row": None, "rank": rank})
        self._hang_up()

    def forgive(self, seconds: float) -> None:
        """The hub does that."""

    def others(self) -> bool:
        """The hub tells the other ranks."""
        return False

    def _call(self, content: dict[str, object]) -> Answer:
        if self._file is None:
            connection = socket.create_connection(self._address, timeout=_CALL_SECONDS)
            self._file = connection.makefile("rw", encoding="utf-8")
            connection.close()  # the file has it
            print(self._token, file=self._file)
        print(json.dumps(content), file=self._file, flush=True)
        return Answer.read(self._file.readline())

    def _hang_up(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None

    def _alone(self, row: Row, stack: str) -> Answer:
        if not self._heard:
            row = replace(row, limit=max(row.limit, self._slow_timeout))
        if not stands_still([row]):
            return Answer()
        if not stack and row.condition == "runs":
            return Answer(asks_for_stack=True)
        hub = replace(row, rank=0, host=self._address[0], pid=0, condition="lost", helpers="")
        return Answer(decide(row.rank, [row, hub] if self._heard else [row], {row.rank: stack}))


def decide(by: int, rows: Sequence[Row], stacks: Mapping[int, str]) -> Verdict:
    """End a run that stands still.

    Args:
        by: rank whose watcher decides.
        rows: of all ranks.
        stacks: Python stacks of the ranks that have told; they go into the file that the rows name.
    """
    asked_by = max((row.signal for row in rows), default=0)
    told = "\n".join(
        f"rank {row.rank} on {row.host} (process {row.pid}): {row.condition}, {row.doing}, "
        f"{row.age:.0f} s without a sign of life\n{stacks.get(row.rank, '')}"
        for row in sorted(rows, key=lambda row: row.rank)
    )
    report = next((row.report for row in rows if row.report), "")
    if report:
        try:
            Path(report).write_text(told, encoding="utf-8")
        except OSError:
            report = ""  # the line for the user is worth more
    return Verdict(by=by, message=message(culprit(rows), asked_by, report), signal=asked_by, stacks=told)
