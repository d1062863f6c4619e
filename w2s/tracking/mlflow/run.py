"""One MLflow run, logged to in the background; nothing that goes wrong with it may stop training."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from w2s.config.sections import TrackingConfig
from w2s.files import write_text
from w2s.redaction import redact
from w2s.tracking.mlflow.datasets import DataInput, to_mlflow
from w2s.tracking.mlflow.delivery import Delivery, Record, history_points
from w2s.tracking.mlflow.opening import OpenedRun, open_run, write_facts
from w2s.tracking.mlflow.store import OPEN_SECONDS, connect, load_mlflow, reason, tracking_uri
from w2s.tracking.mlflow.worker import Worker

Status = Literal["FINISHED", "FAILED", "KILLED"]

_RUN_ID_FILE = "mlflow_run_id"
_VIEW = "workflowType=machine_learning"
"""What makes MLflow 3.17 open a run in its view for model training: it goes by the address."""
_FLUSH_SECONDS = 60.0
_SLOW_SECONDS = 1.0
_PAUSE_FACTOR = 10.0  # after a call that failed in 10 s nothing is tried for 100 s

_Call = Callable[[OpenedRun], object]


class MlflowRun:
    """A run of the store, used on the main rank only: a new one, or that of MLFLOW_RUN_ID, of `run_id` or of `folder`.

    All writing happens in a thread of its own, in order. What a call could not bring is brought later, at the latest at
    the end, and a run that could not be opened is opened later. After a slow failure the store is left alone for a
    while. `warnings` tells what never arrived.

    Args:
        tracking: section `tracking` of the configuration; nothing happens unless it is enabled.
        root: folder of all runs, which the default store is in.
        name: name of a new run.
        tags: written on a new and on a continued run.
        params: written once in the life of a run.
        run_id: run to continue; one that the store does not know makes a new run and a warning.
        parent_run_id: run that a new one is a child of.
        folder: run folder, which notes the id, so that a repeated command continues that run.
        history: what a continued run has logged so far, as its metrics.jsonl has it; what the store lacks is sent.
    """

    def __init__(
        self,
        tracking: TrackingConfig,
        root: Path,
        name: str,
        *,
        tags: Mapping[str, str],
        params: Mapping[str, object],
        run_id: str | None = None,
        parent_run_id: str | None = None,
        folder: Path | None = None,
        history: Sequence[Record] = (),
    ) -> None:
        uri = tracking_uri(tracking, root)
        self._uri = redact(uri)  # for messages
        self._enabled = tracking.enabled
        self._opened: OpenedRun | None = None
        self._folder = folder
        self._history: Sequence[Record] = history
        self._delivery = Delivery()
        self._undone: list[_Call] = []
        self._warnings: list[str] = []
        self._last_failure = ""
        self._quiet_until = 0.0
        self._opening: tuple[Future[None], Future[bool]] | None = None
        if self._enabled:
            stored = stored_run_id(folder) if folder else None
            # Used once, as MLflow itself does it: the children of this run must not find the variable again.
            self._wanted = os.environ.pop("MLFLOW_RUN_ID", None) or run_id or stored
            self._open = partial(open_run, uri, tracking, root, name, tags, params, self._wanted, parent_run_id)
            self._worker = Worker("mlflow")
            # To import MLflow takes seconds, in which the caller has better to do.
            self._opening = self._worker.submit(load_mlflow), self._worker.submit(self._attempt, lambda opened: None)

    @property
    def page(self) -> str | None:
        """Where a browser shows the run, in the view for model training; None if no server does, or not yet."""
        opened = self._opened
        if opened is None or not self._uri.startswith(("http://", "https://")):
            return None
        return f"{self._uri.rstrip('/')}/#/experiments/{opened.experiment_id}/runs/{opened.run_id}?{_VIEW}"

    @property
    def run_id(self) -> str | None:
        """Id of the run; None when tracking is off or the store does not answer, for which the first call waits."""
        opening, self._opening = self._opening, None
        if opening is not None:
            loading, answer = opening
            loading.exception()  # outside the time limit: a slow disk is not the store's fault
            try:
                answer.result(OPEN_SECONDS)
            except TimeoutError:
                self._last_failure = f"no answer within {OPEN_SECONDS:.0f} s"
        return self._opened.run_id if self._opened else None

    def _attempt(self, call: _Call) -> bool:
        """Make a call in the worker's thread; return whether it went well."""
        begin = time.monotonic()
        if begin < self._quiet_until:
            return False
        try:
            if self._opened is None:
                self._opened = self._open()
                self._note_opened(self._opened)
            call(self._opened)
        except Exception as error:  # MLflow's own, its database's and its HTTP library's are no reason to stop training
            self._last_failure = reason(error)
            end = time.monotonic()
            if end - begin > _SLOW_SECONDS:
                self._quiet_until = end + _PAUSE_FACTOR * (end - begin)
            return False
        return True

    def _note_opened(self, opened: OpenedRun) -> None:
        if self._wanted and self._wanted != opened.run_id:
            self._warnings.append(
                f"MLflow at {self._uri} does not know run {self._wanted}: continued in run {opened.run_id}"
            )
        if self._folder is not None:
            write_text(self._folder / _RUN_ID_FILE, f"{opened.run_id}\n")

    def _deliver(self, opened: OpenedRun) -> None:
        if not self._delivery.compared:
            self._delivery.compare(opened.client, opened.run_id, history_points(self._history))
        self._delivery.send(opened.client, opened.run_id)

    def log(self, metrics: Mapping[str, float], step: int, samples: int | None = None) -> None:
        """Logs metrics of a step and, where it is one of training, the samples seen until then, without waiting."""
        if self._enabled:
            seen = {} if samples is None else {"samples_seen": float(samples)}
            self._delivery.add({**metrics, **seen}, step, int(time.time() * 1000))
            self._worker.submit(self._attempt, self._deliver)

    def rewind(self) -> None:
        """Lets the metrics of steps be logged anew, as those steps are done again with other samples."""
        self._delivery.rewind()

    def _send(self, call: _Call) -> None:
        """Make a call later, and once more at the end if it fails."""

        def attempt() -> None:
            if not self._attempt(call):
                self._undone.append(call)

        if self._enabled:
            self._worker.submit(attempt)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file, into a folder of the run's artifacts where one is given, without waiting."""
        self._send(lambda opened: opened.client.log_artifact(opened.run_id, str(path), folder))

    def note(self, tags: Mapping[str, str], params: Mapping[str, object] | None = None) -> None:
        """Writes further tags, and parameters that the run does not have yet, without waiting."""
        self._send(lambda opened: write_facts(opened.client, opened.run_id, tags, params or {}))

    def adopt(self, run_id: str) -> None:
        """Makes another run, which may have begun before this one's store answered, a child of it, without waiting."""
        self._send(lambda opened: opened.client.set_tag(run_id, "mlflow.parentRunId", opened.run_id))

    def inputs(self, inputs: Iterable[DataInput]) -> None:
        """Notes the data sets that the run reads, without waiting."""
        listed = list(inputs)
        self._send(lambda opened: opened.client.log_inputs(opened.run_id, [to_mlflow(item) for item in listed]))

    def end(self, status: Status) -> None:
        """Writes what is still waiting, then the final status."""
        if not self._enabled:
            return

        def close() -> None:
            self._quiet_until = 0.0  # a server that came back should learn how the run ended
            if self._opened is not None and self._opened.monitor is not None:
                self._opened.monitor.finish()
            self._attempt(self._deliver)
            self._undone = [call for call in self._undone if not self._attempt(call)]
            self._attempt(lambda opened: opened.client.set_terminated(opened.run_id, status))

        try:
            self._worker.submit(close).result(_FLUSH_SECONDS)
        except TimeoutError:
            self._warnings.append(f"MLflow at {self._uri} did not take the end of the log in {_FLUSH_SECONDS:.0f} s")

    def warnings(self) -> list[str]:
        """What a person should know at the end: one line each."""
        if not self._enabled:
            return []
        if self._opened is None:
            return [
                f"MLflow at {self._uri} could not be used ({self._last_failure}): nothing was logged there, see "
                "metrics.jsonl; set tracking.uri, or tracking.enabled=false to do without"
            ]
        values, others = len(self._delivery) + self._delivery.refused, len(self._undone)
        if not values + others:
            return list(self._warnings)
        lacks = f"MLflow at {self._uri} lacks {values} values of metrics and {others} other things"
        return [*self._warnings, f"{lacks} ({self._last_failure}); metrics.jsonl has all values"]


def stored_run_id(folder: Path) -> str | None:
    """The MLflow run that a run's folder belongs to."""
    path = folder / _RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def end_abandoned(tracking: TrackingConfig, root: Path, folder: Path, history: Sequence[Record]) -> None:
    """Ends the run of a folder as FAILED, with all its metrics, if it stands as RUNNING there: its ranks are dead.

    Args:
        tracking: section `tracking` of the configuration.
        root: folder of all runs.
        folder: run folder.
        history: what its metrics.jsonl has.
    """
    run_id = stored_run_id(folder)
    if not tracking.enabled or run_id is None:
        return

    def is_running() -> bool:
        return connect(tracking_uri(tracking, root)).get_run(run_id).info.status == "RUNNING"

    try:
        load_mlflow()
        running = Worker("mlflow").submit(is_running).result(OPEN_SECONDS)
    except Exception:  # a store that does not answer is told nothing
        return
    if running:
        quiet = replace(tracking, system_metrics=False)
        run = MlflowRun(quiet, root, folder.name, tags={}, params={}, run_id=run_id, folder=folder, history=history)
        run.end("FAILED")
