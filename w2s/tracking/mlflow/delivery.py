"""Metrics on their way to an MLflow run: each point arrives once, however often it is logged or the store fails."""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST_POINTS = 1000
"""What MLflow takes in one call."""
_BAD_REQUEST = 400

Record = Mapping[str, float | None]
"""A line of metrics.jsonl."""


class Point(NamedTuple):
    """A value of a metric.

    Attributes:
        name: of the metric.
        value: its value.
        timestamp: milliseconds after the year 1970 began.
        step: of training.
        turn: how often training had been rewound before.
    """

    name: str
    value: float
    timestamp: int
    step: int
    turn: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What only one point of a run has."""
        return self.name, self.step, self.turn


class Delivery:
    """Points that wait for the store, the oldest first, and the keys of those that it has.

    `add` and `rewind` may be called from any thread, everything else from one of them only.

    Attributes:
        refused: points that the store will never take.
        compared: whether it is known what the store has had before.
    """

    def __init__(self) -> None:
        self._waiting: deque[Point] = deque()
        self._there: set[tuple[str, int, int]] = set()
        self._turn = 0
        self.refused = 0
        self.compared = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, values: Mapping[str, float], step: int, milliseconds: int) -> None:
        """Queues the points of a log call, made so many milliseconds after the year 1970 began."""
        self._waiting.extend(_points(values, step, milliseconds, self._turn))

    def rewind(self) -> None:
        """Lets the points that follow come where the store has some of their steps: these are done again."""
        self._turn += 1

    def compare(self, client: "MlflowClient", run_id: str, history: list[Point]) -> None:
        """Finds out what the store has, which shall not come twice, and puts what the run has logged before in front.

        Raises:
            Exception: whatever MLflow raises.
        """
        for name in client.get_run(run_id).data.metrics:
            self._there |= {(name, point.step, 0) for point in client.get_metric_history(run_id, name)}
        self._waiting.extendleft(reversed(history))
        self.compared = True

    def send(self, client: "MlflowClient", run_id: str) -> None:
        """Sends what waits, in as few calls as the store takes.

        Raises:
            Exception: whatever MLflow raises; what the store has not taken waits on.
        """
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        while self._waiting:
            # By index: an iterator does not outlive what another thread appends.
            batch = [self._waiting[index] for index in range(min(len(self._waiting), _MOST_POINTS))]
            new: dict[tuple[str, int, int], Point] = {}
            for point in batch:
                if point.key not in self._there:
                    new.setdefault(point.key, point)
            metrics = [Metric(point.name, point.value, point.timestamp, point.step) for point in new.values()]
            try:
                if metrics:
                    client.log_batch(run_id, metrics=metrics)
            except MlflowException as error:
                if error.get_http_status_code() != _BAD_REQUEST:
                    raise
                self.refused += len(metrics)
            self._there |= new.keys()
            for _ in batch:
                self._waiting.popleft()


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
            points += _points(values, step, int(1000 * seconds), turn=0)
    return points


def _points(values: Mapping[str, float], step: int, milliseconds: int, turn: int) -> list[Point]:
    return [Point(clean_name(name), value, milliseconds, step, turn) for name, value in values.items()]


def clean_name(name: str) -> str:
    """A metric's name with only what MLflow takes: letters, digits, `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)
