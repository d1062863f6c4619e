"""One MLflow run, logged to in the background; nothing that goes wrong with it may stop training."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from w2s.config.sections import TrackingConfig
from w2s.errors import StopRun
from w2s.files import write_text
from w2s.redaction import redact
from w2s.tracking.mlflow.datasets import DataInput, to_mlflow
from w2s.tracking.mlflow.delivery import Delivery, Record, history_points
from w2s.tracking.mlflow.store import OPEN_SECONDS, artifact_location, connect, load_mlflow, reason, tracking_uri
from w2s.tracking.mlflow.worker import Worker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

Status = Literal["FINISHED", "FAILED", "KILLED"]

_RUN_ID_FILE = "mlflow_run_id"
_LONGEST_PARAM = 6000
_LONGEST_TAG = 8000
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The tag by which MLflow's pages open an experiment in their view for model training."""
_VIEW = "workflowType=machine_learning"
"""What makes those of 3.17 do so, which go by the address and by what the browser has last chosen."""
_FLUSH_SECONDS = 60.0
_SLOW_SECONDS = 1.0
_PAUSE_FACTOR = 10.0  # after a call that failed in 10 s nothing is tried for 100 s


@dataclass(frozen=True)
class _Request:
    """What is wanted of the store when a run starts."""

    uri: str
    tracking: TrackingConfig
    root: Path
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, object]
    run_id: str | None
    parent_run_id: str | None
    folder: Path | None


@dataclass(frozen=True)
class _Opened:
    """What the store answered."""

    client: "MlflowClient"
    experiment_id: str
    run_id: str
    monitor: "SystemMetricsMonitor | None"
    lost_run_id: str | None


_Call = Callable[[_Opened], object]


class MlflowRun:
    """A run of the store, used on the main rank only. `start` makes one.

    All writing happens in a thread of its own, in order. What a call could not bring is brought later, at the latest at
    the end, and a run that could not be opened is opened later. After a slow failure the store is left alone for a
    while. `warnings` tells what never arrived.
    """

    def __init__(self, uri: str, request: _Request | None, history: Sequence[Record]) -> None:
        self._uri = redact(uri)  # for messages
        self._request = request
        self._opened: _Opened | None = None
        self._history: Sequence[Record] | None = history
        self._delivery = Delivery()
        self._worker = Worker("mlflow")
        self._opening: tuple[Future[None], Future[bool]] | None = None
        self._undone: list[_Call] = []
        self._warnings: list[str] = []
        self._last_failure = ""
        self._quiet_until = 0.0

    @classmethod
    def start(
        cls,
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
    ) -> "MlflowRun":
        """Starts a run, or continues the one of MLFLOW_RUN_ID (where that is set), of `run_id` or of `folder`.

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
        uri = tracking_uri(tracking, root)
        if not tracking.enabled:
            return cls(uri, None, history)
        # Used once, as MLflow itself does it: the children of this run must not find the variable again.
        wanted = os.environ.pop("MLFLOW_RUN_ID", None) or run_id or (stored_run_id(folder) if folder else None)
        run = cls(uri, _Request(uri, tracking, root, name, tags, params, wanted, parent_run_id, folder), history)
        run._begin()
        return run

    @property
    def page(self) -> str | None:
        """Where a browser shows the run, in the view for model training; None if no server does, or not yet."""
        opened = self._opened
        if opened is None or not self._uri.startswith(("http://", "https://")):
            return None
        place = f"experiments/{opened.experiment_id}/runs/{opened.run_id}"
        return f"{self._uri.rstrip('/')}/#/{place}?{_VIEW}"

    def _begin(self) -> None:
        # To import MLflow takes seconds, in which the caller has better to do.
        self._opening = self._worker.submit(load_mlflow), self._worker.submit(self._attempt, lambda opened: None)

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
            call(self._opened or self._open())
        except Exception as error:  # MLflow's own, its database's and its HTTP library's are no reason to stop training
            self._last_failure = reason(error)
            end = time.monotonic()
            if end - begin > _SLOW_SECONDS:
                self._quiet_until = end + _PAUSE_FACTOR * (end - begin)
            return False
        return True

    def _open(self) -> _Opened:
        if self._request is None:
            raise RuntimeError("a run that is not tracked is never opened")
        self._opened = opened = _open_run(self._request)
        if opened.lost_run_id:
            self._warnings.append(
                f"MLflow at {self._uri} does not know run {opened.lost_run_id}: continued in run {opened.run_id}"
            )
        if self._request.folder is not None:
            write_text(self._request.folder / _RUN_ID_FILE, f"{opened.run_id}\n")
        return opened

    def _deliver(self, opened: _Opened) -> None:
        if self._history is not None:
            self._delivery.compare(opened.client, opened.run_id, history_points(self._history))
            self._history = None
        self._delivery.send(opened.client, opened.run_id)

    def log(self, metrics: Mapping[str, float], step: int, samples: int | None = None) -> None:
        """Logs metrics of a step and, where it is one of training, the samples seen until then, without waiting."""
        if self._request is not None:
            seen = {} if samples is None else {"samples_seen": float(samples)}
            self._delivery.add({**metrics, **seen}, step, int(time.time() * 1000))
            self._worker.submit(self._attempt, self._deliver)

    def rewind(self, step: int) -> None:
        """Lets metrics of later steps be logged anew, as those steps are done again with other samples."""
        self._delivery.rewind(step)

    def _send(self, call: _Call) -> None:
        """Make a call later, and once more at the end if it fails."""

        def attempt() -> None:
            if not self._attempt(call):
                self._undone.append(call)

        if self._request is not None:
            self._worker.submit(attempt)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file, into a folder of the run's artifacts where one is given, without waiting."""
        self._send(lambda opened: opened.client.log_artifact(opened.run_id, str(path), folder))

    def note(self, tags: Mapping[str, str], params: Mapping[str, object] | None = None) -> None:
        """Writes further tags, and parameters that the run does not have yet, without waiting."""
        self._send(lambda opened: _write(opened.client, opened.run_id, tags, params or {}))

    def adopt(self, run_id: str) -> None:
        """Makes another run, which may have begun before this one's store answered, a child of it, without waiting."""

        def write(opened: _Opened) -> None:
            from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

            opened.client.set_tag(run_id, MLFLOW_PARENT_RUN_ID, opened.run_id)

        self._send(write)

    def inputs(self, inputs: Iterable[DataInput]) -> None:
        """Notes the data sets that the run reads, without waiting."""
        listed = list(inputs)

        self._send(lambda opened: opened.client.log_inputs(opened.run_id, [to_mlflow(item) for item in listed]))

    def end(self, status: Status) -> None:
        """Writes what is still waiting, then the final status."""
        if self._request is None:
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
        if self._request is None:
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


def _open_run(request: _Request) -> _Opened:
    """Starts or continues a run; runs in the worker's thread."""
    client = connect(request.uri)
    known = _continue_run(client, request.run_id) if request.run_id else None
    run = known or _new_run(client, request.uri, request)
    _write(client, run.info.run_id, request.tags, {} if run.data.params else request.params)
    monitor = _start_monitor(request.uri, run.info.run_id) if request.tracking.system_metrics else None
    lost = request.run_id if known is None else None
    return _Opened(client, run.info.experiment_id, run.info.run_id, monitor, lost)


def _continue_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run, marked as running again, or None when the store does not have it (any more)."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in (ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)):
            return None
        raise
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run


def _new_run(client: "MlflowClient", uri: str, request: _Request) -> "Run":
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    parent = {MLFLOW_PARENT_RUN_ID: request.parent_run_id} if request.parent_run_id else {}
    experiment_id = _experiment_id(client, request.tracking.experiment, artifact_location(uri, request.root))
    return client.create_run(experiment_id, tags=resolve_tags(parent), run_name=request.name)


def _experiment_id(client: "MlflowClient", name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    try:
        return client.create_experiment(name, artifact_location=location, tags=_KIND)
    except MlflowException:  # two runs that start together both find no experiment, and one of them comes second
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _write(client: "MlflowClient", run_id: str, tags: Mapping[str, str], params: Mapping[str, object]) -> None:
    from mlflow.entities import Param, RunTag

    client.log_batch(
        run_id,
        params=[Param(name, str(value)[:_LONGEST_PARAM]) for name, value in params.items()],
        tags=[RunTag(name, value[:_LONGEST_TAG]) for name, value in tags.items()],
    )


def _start_monitor(uri: str, run_id: str) -> "SystemMetricsMonitor":
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


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
        own = replace(tracking, system_metrics=False)
        run = MlflowRun.start(own, root, folder.name, tags={}, params={}, run_id=run_id, folder=folder, history=history)
        run.end("FAILED")


@contextmanager
def parent_run(
    tracking: TrackingConfig, folder: Path, *, tags: Mapping[str, str], params: Mapping[str, object]
) -> Iterator[MlflowRun]:
    """The MLflow run above the stages of one `w2s run`; give its `run_id` to them as `tracking.parent_run`.

    It ends as FINISHED, as KILLED after a request to stop, or as FAILED after any other exception.

    Args:
        tracking: section `tracking` of the configuration.
        folder: folder of the group, in the folder of all runs; its name is the run's name.
        tags: tags of the run.
        params: its parameters.
    """
    own = replace(tracking, system_metrics=False)  # the stages log them
    run = MlflowRun.start(own, folder.parent, folder.name, tags=tags, params=params, folder=folder)
    status: Status = "FAILED"
    try:
        _ = run.run_id  # for which its children wait
        yield run
        status = "FINISHED"
    except (StopRun, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        run.end(status)
