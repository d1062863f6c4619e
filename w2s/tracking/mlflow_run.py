"""One MLflow run, logged to in the background; nothing that goes wrong with it may stop training."""

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from w2s.config.sections import TrackingConfig
from w2s.errors import StopRun
from w2s.redaction import redact
from w2s.tracking.files import write_text
from w2s.tracking.store import OPEN_SECONDS, artifact_location, connect, load_mlflow, reason, tracking_uri
from w2s.tracking.worker import Worker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

Status = Literal["FINISHED", "FAILED", "KILLED"]

_RUN_ID_FILE = "mlflow_run_id"
_LONGEST_PARAM = 6000
_FLUSH_SECONDS = 60.0
_SLOW_SECONDS = 1.0
_PAUSE_FACTOR = 10.0  # after a call that failed in 10 s nothing is tried for 100 s


class DataInput(NamedTuple):
    """A data set that a run read.

    Attributes:
        name: name of the data set.
        source: its shards, as in the configuration.
        digest: hash of the list of shards and their sizes.
        context: what it was used for, such as `training`.
    """

    name: str
    source: str
    digest: str
    context: str


@dataclass(frozen=True)
class _Request:
    """What is wanted of the store when a run starts."""

    tracking: TrackingConfig
    root: Path
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, object]
    run_id: str | None
    parent_run_id: str | None


@dataclass(frozen=True)
class _Opened:
    """What the store answered."""

    client: "MlflowClient"
    run_id: str
    monitor: "SystemMetricsMonitor | None"
    lost_run_id: str | None


class MlflowRun:
    """A run of the store, used on the main rank only. `start` makes one.

    All writing happens in a thread of its own, in order. A call that fails is counted and left out, and after a slow
    failure the store is left alone for a while, so that a server that died does not pile up work; `warnings` tells.

    Attributes:
        run_id: id of the run, or None when tracking is off or the store did not answer.
    """

    def __init__(self, uri: str) -> None:
        self.run_id: str | None = None
        self._uri = redact(uri)  # for messages
        self._opened: _Opened | None = None
        self._worker = Worker("mlflow")
        self._warnings: list[str] = []
        self._failed_calls = 0
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
    ) -> "MlflowRun":
        """Starts a run, or continues the one of MLFLOW_RUN_ID (where that is set) or of `run_id`.

        Args:
            tracking: section `tracking` of the configuration; nothing happens unless it is enabled.
            root: folder of all runs, which the default store is in.
            name: name of a new run.
            tags: written on a new and on a continued run.
            params: written once in the life of a run.
            run_id: run to continue; one that the store does not know makes a new run and a warning.
            parent_run_id: run that a new one is a child of.
        """
        uri = tracking_uri(tracking, root)
        run = cls(uri)
        if tracking.enabled:
            run._open(uri, _Request(tracking, root, name, tags, params, run_id, parent_run_id))
        return run

    def _open(self, uri: str, request: _Request) -> None:
        try:
            load_mlflow()  # outside the time limit: a slow disk is no fault of the store
            self._opened = self._worker.submit(_open_run, uri, request).result(OPEN_SECONDS)
        except TimeoutError:
            self._give_up(f"no answer within {OPEN_SECONDS:.0f} s")
        except Exception as error:  # MLflow raises its own, its database's and its HTTP library's errors
            self._give_up(reason(error))
        else:
            self.run_id = self._opened.run_id
            if self._opened.lost_run_id:
                self._warnings.append(
                    f"MLflow at {self._uri} does not know run {self._opened.lost_run_id}: went on in run {self.run_id}"
                )

    def _give_up(self, why: str) -> None:
        self._warnings.append(
            f"MLflow at {self._uri} could not be used ({why}): nothing was logged there, see metrics.jsonl; "
            "set tracking.uri, or tracking.enabled=false to do without"
        )

    def _send(self, call: Callable[[_Opened], object]) -> None:
        if self._opened is not None:
            self._worker.submit(self._attempt, call, self._opened)

    def _attempt(self, call: Callable[[_Opened], object], opened: _Opened) -> None:
        begin = time.monotonic()
        if begin < self._quiet_until:
            self._failed_calls += 1
            return
        try:
            call(opened)
        except Exception as error:  # see _open; a failure of the log is no reason to stop training
            self._failed_calls += 1
            self._last_failure = reason(error)
            end = time.monotonic()
            if end - begin > _SLOW_SECONDS:
                self._quiet_until = end + _PAUSE_FACTOR * (end - begin)

    def log(self, metrics: Mapping[str, float], step: int, samples: int) -> None:
        """Logs metrics of a step, and the samples seen until then, without waiting."""
        now = int(time.time() * 1000)

        def write(opened: _Opened) -> None:
            from mlflow.entities import Metric

            values = {**metrics, "samples_seen": float(samples)}
            points = [Metric(clean_name(name), value, now, step) for name, value in values.items()]
            opened.client.log_batch(opened.run_id, metrics=points)

        self._send(write)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file, into a folder of the run's artifacts where one is given, without waiting."""
        self._send(lambda opened: opened.client.log_artifact(opened.run_id, str(path), folder))

    def inputs(self, inputs: Iterable[DataInput]) -> None:
        """Notes the data sets that the run reads, without waiting."""
        listed = list(inputs)

        def write(opened: _Opened) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            datasets = [
                DatasetInput(
                    Dataset(item.name, item.digest, "webdataset", json.dumps({"uri": redact(item.source)})),
                    [InputTag("mlflow.data.context", item.context)],
                )
                for item in listed
            ]
            opened.client.log_inputs(opened.run_id, datasets)

        self._send(write)

    def end(self, status: Status) -> None:
        """Writes what is still waiting, then the final status."""
        if self._opened is None:
            return
        if self._opened.monitor is not None:
            self._worker.submit(self._opened.monitor.finish)

        def close(opened: _Opened) -> None:
            self._quiet_until = 0.0  # a server that came back should learn how the run ended
            self._attempt(lambda opened: opened.client.set_terminated(opened.run_id, status), opened)

        closing = self._worker.submit(close, self._opened)
        self._opened = None
        try:
            closing.result(_FLUSH_SECONDS)
        except TimeoutError:
            self._warnings.append(f"MLflow at {self._uri} did not take the end of the log in {_FLUSH_SECONDS:.0f} s")

    def warnings(self) -> list[str]:
        """What a person should know at the end: one line each."""
        if not self._failed_calls:
            return list(self._warnings)
        failures = f"writes to MLflow at {self._uri} that failed: {self._failed_calls} ({self._last_failure})"
        return [*self._warnings, f"{failures}; its curves may have gaps, metrics.jsonl has everything"]


def _open_run(uri: str, request: _Request) -> _Opened:
    """Starts or continues a run; runs in the worker's thread."""
    client = connect(uri)
    # Used once, as MLflow itself does it: the children of this run must not find the variable again.
    wanted = os.environ.pop("MLFLOW_RUN_ID", None) or request.run_id
    known = _continue_run(client, wanted) if wanted else None
    run = known or _new_run(client, uri, request)
    _write_tags_and_params(client, run, request, write_params=not run.data.params)
    monitor = _start_monitor(uri, run.info.run_id) if request.tracking.system_metrics else None
    return _Opened(client, run.info.run_id, monitor, wanted if known is None else None)


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
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:  # two runs that start together both find no experiment, and one of them comes second
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _write_tags_and_params(client: "MlflowClient", run: "Run", request: _Request, *, write_params: bool) -> None:
    from mlflow.entities import Param, RunTag

    tags = [RunTag(name, value) for name, value in request.tags.items()]
    params = [Param(name, str(value)[:_LONGEST_PARAM]) for name, value in request.params.items()]
    client.log_batch(run.info.run_id, params=params if write_params else [], tags=tags)


def _start_monitor(uri: str, run_id: str) -> "SystemMetricsMonitor":
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def clean_name(name: str) -> str:
    """A metric's name with only what MLflow takes: letters, digits, `_-. :/`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"), flags=re.ASCII)


def stored_run_id(folder: Path) -> str | None:
    """The MLflow run that a run's folder belongs to."""
    path = folder / _RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() or None if path.is_file() else None


def store_run_id(folder: Path, run: MlflowRun) -> None:
    """Notes in a run's folder which MLflow run it belongs to, so that a repeated command continues that one.

    Raises:
        UserError: the folder cannot be written.
    """
    if run.run_id is not None:
        write_text(folder / _RUN_ID_FILE, f"{run.run_id}\n")


@contextmanager
def parent_run(tracking: TrackingConfig, folder: Path, *, tags: Mapping[str, str]) -> Iterator[MlflowRun]:
    """The MLflow run above the stages of one `w2s run`; give its `run_id` to them as `tracking.parent_run`.

    It ends as FINISHED, as KILLED after a request to stop, or as FAILED after any other exception.

    Args:
        tracking: section `tracking` of the configuration.
        folder: folder of the group, in the folder of all runs; its name is the run's name.
        tags: tags of the run.
    """
    own = replace(tracking, system_metrics=False)  # the stages log them
    run = MlflowRun.start(own, folder.parent, folder.name, tags=tags, params={}, run_id=stored_run_id(folder))
    store_run_id(folder, run)
    status: Status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (StopRun, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        run.end(status)
