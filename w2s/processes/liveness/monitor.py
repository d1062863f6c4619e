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

from w2s.processes.liveness.verdict import RankStatus, Verdict, first_failed, is_stalled, message

LOST_SECONDS = 10.0
"""Without a word for so long a watcher is lost."""
_ASK_SECONDS = 3.0
"""How long the ranks have to tell where they stand before a run that stalls is ended."""
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
        self._statuses: dict[int, tuple[RankStatus, float]] = {}
        self._stacks: dict[int, str] = {}
        self._known: set[int] = set()
        self._told: set[int] = set()
        self._asked_at: float | None = None
        self._verdict: Verdict | None = None
        if listener is not None:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def tell(self, status: RankStatus, stack: str) -> Answer:
        """Take a rank's row, and decide."""
        with self._lock:
            self._take(status, stack)
            self._judge()
            return self._answer(status.rank)

    def leave(self, rank: int) -> None:
        """Forget a rank that is done."""
        with self._lock:
            self._statuses.pop(rank, None)

    def forgive(self, seconds: float) -> None:
        """Count a pause of this process, in which nobody could be heard, for nobody."""
        with self._lock:
            self._statuses = {rank: (status, at + seconds) for rank, (status, at) in self._statuses.items()}

    def others(self) -> bool:
        """Whether ranks beside rank 0 still run and do not know the verdict."""
        with self._lock:
            now = {status.rank for status in self._current() if status.condition not in ("dead", "lost")}
            return bool(now - self._told - {0})

    def _take(self, status: RankStatus, stack: str) -> None:
        self._known.add(status.rank)
        self._statuses[status.rank] = status, self._clock()
        if stack:
            self._stacks[status.rank] = stack

    def _answer(self, rank: int) -> Answer:
        if self._verdict is not None:
            self._told.add(rank)
        return Answer(self._verdict, self._asked_at is not None and rank not in self._stacks)

    def _current(self) -> list[RankStatus]:
        now, everyone = self._clock(), len(self._known) == self._world_size
        statuses = []
        for status, at in self._statuses.values():
            status = replace(status, age=status.age + now - at)
            if now - at > LOST_SECONDS and status.condition != "dead":
                status = replace(status, condition="lost", age=now - at, limit=status.lost_limit)
            statuses.append(status if everyone else replace(status, limit=max(status.limit, self._slow_timeout)))
        return statuses

    def _judge(self) -> None:
        statuses = self._current()
        if self._verdict is not None:
            return
        if not is_stalled(statuses):
            self._asked_at = None
            self._stacks.clear()
        elif self._asked_at is None:
            self._asked_at = self._clock()
        elif self._clock() - self._asked_at > _ASK_SECONDS or self._all_answered(statuses):
            self._verdict = decide(0, statuses, self._stacks)

    def _all_answered(self, statuses: list[RankStatus]) -> bool:
        return all(status.rank in self._stacks for status in statuses if status.condition == "runs")

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
                    status = RankStatus(**content["row"])
                    with self._lock:
                        self._take(status, content["stack"])
                        answer = self._answer(status.rank)
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

    def tell(self, status: RankStatus, stack: str) -> Answer:
        """Take the rank's row to the hub, and bring its answer back."""
        try:
            answer = self._call({"row": asdict(status), "stack": stack})
        except (OSError, ValueError):
            self._hang_up()
            return self._alone(status, stack)
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

    def _alone(self, status: RankStatus, stack: str) -> Answer:
        if not self._heard:
            status = replace(status, limit=max(status.limit, self._slow_timeout))
        if not is_stalled([status]):
            return Answer()
        if not stack and status.condition == "runs":
            return Answer(asks_for_stack=True)
        hub = replace(status, rank=0, host=self._address[0], pid=0, condition="lost", helpers="")
        return Answer(decide(status.rank, [status, hub] if self._heard else [status], {status.rank: stack}))


def decide(by: int, statuses: Sequence[RankStatus], stacks: Mapping[int, str]) -> Verdict:
    """End a run that stalls.

    Args:
        by: rank whose watcher decides.
        statuses: of all ranks.
        stacks: Python stacks of the ranks that have told; they go into the file that the rows name.
    """
    asked_by = max((status.signal for status in statuses), default=0)
    told = "\n".join(
        f"rank {status.rank} on {status.host} (process {status.pid}): {status.condition}, {status.doing}, "
        f"{status.age:.0f} s without a sign of life\n{stacks.get(status.rank, '')}"
        for status in sorted(statuses, key=lambda status: status.rank)
    )
    report = next((status.report for status in statuses if status.report), "")
    if report:
        try:
            Path(report).write_text(told, encoding="utf-8")
        except OSError:
            report = ""  # the line for the user is worth more
    return Verdict(by=by, message=message(first_failed(statuses), asked_by, report), signal=asked_by, stacks=told)
