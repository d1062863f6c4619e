"""Metrics on their way to an MLflow run: each point arrives once, however often it is logged or the store fails."""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST_POINTS = 1000
"""What MLflow takes in one call."""
_BAD_REQUEST = 400

Record = Mapping[str, float | None]
"""A line of metrics.jsonl."""


class Point(NamedTuple):
    """A value of a metric, in the order of the arguments of MLflow's `Metric`."""

    key: str
    value: float
    timestamp: int
    step: int


@dataclass(frozen=True)
class _Rewind:
    step: int


class Delivery:
    """Points that wait for the store, the oldest first, and those that it has.

    `add` may be called from any thread, everything else from one of them only.

    Attributes:
        refused: points that the store will never take.
    """

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()
        self._there: dict[str, set[int]] = {}
        self.refused = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, values: Mapping[str, float], step: int, milliseconds: int) -> None:
        """Queues the points of a log call, made so many milliseconds after the year 1970 began."""
        self._waiting.extend(_points(values, step, milliseconds))

    def compare(self, client: "MlflowClient", run_id: str, history: list[Point]) -> None:
        """Finds out what the store has, which shall not come twice, and puts what the run has logged before in front.

        Raises:
            Exception: whatever MLflow raises.
        """
        for name in client.get_run(run_id).data.metrics:
            self._there[name] = {point.step for point in client.get_metric_history(run_id, name)}
        self._waiting.extendleft(reversed(history))

    def rewind(self, step: int) -> None:
        """Lets points of later steps come again, from any thread: those steps are done with other samples now."""
        self._waiting.append(_Rewind(step))

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Sends what waits, in as few calls as the store takes.

        Raises:
            Exception: whatever MLflow raises; what the store has not taken waits on.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        while self._waiting:
            if isinstance(self._waiting[0], _Rewind):
                self._forget(self._waiting.popleft().step)
                continue
            batch = self._batch()
            new = {(point.key, point.step): point for point in reversed(batch) if not self._has(point)}
            try:
                if new:
                    client.log_batch(run_id, metrics=[Metric(*point) for point in reversed(new.values())])
            except MlflowException as error:
                if error.get_http_status_code() != _BAD_REQUEST:
                    raise
                self.refused += len(new)
            for name, step in new:
                self._there.setdefault(name, set()).add(step)
            for _ in batch:
                self._waiting.popleft()

    def _batch(self) -> list[Point]:
        # By index: an iterator does not outlive what another thread appends.
        first = (self._waiting[index] for index in range(min(len(self._waiting), _MOST_POINTS)))
        return list(takewhile(lambda point: not isinstance(point, _Rewind), first))

    def _has(self, point: Point) -> bool:
        return point.step in self._there.get(point.key, ())

    def _forget(self, step: int) -> None:
        self._there = {name: {each for each in steps if each <= step} for name, steps in self._there.items()}


def history_points(records: Sequence[Record]) -> list[Point]:
    """The points of the lines of a run's metrics.jsonl; what was not finite is not a number again.

    A damaged line may have anything in it: what is not a number is left out, and a line that does not say when it was.
    """
    points = []
    for record in records:
        numbers = {name: float("nan") if value is None else value for name, value in record.items()}
        values = {name: float(value) for name, value in numbers.items() if type(value) in (int, float)}
        if {"step", "time"} <= values.keys() and math.isfinite(values["time"]):
            step, seconds = int(values.pop("step")), values.pop("time")
            points += _points(values, step, int(1000 * seconds))
    return points


def _points(values: Mapping[str, float], step: int, milliseconds: int) -> list[Point]:
    return [Point(clean_name(name), value, milliseconds, step) for name, value in values.items()]


def clean_name(name: str) -> str:
    """A metric's name with only what MLflow takes: letters, digits, `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)
