"""Finding a run in the MLflow store, or making one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from w2s.config.sections import TrackingConfig
from w2s.tracking.mlflow.store import artifact_location, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_LONGEST_PARAM = 6000
_LONGEST_TAG = 8000
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""The tag by which MLflow's pages open an experiment in their view for model training."""


@dataclass(frozen=True)
class OpenedRun:
    """A run that the store knows, and what writes to it."""

    client: "MlflowClient"
    experiment_id: str
    run_id: str
    monitor: "SystemMetricsMonitor | None"


def open_run(
    uri: str,
    tracking: TrackingConfig,
    root: Path,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, object],
    wanted: str | None,
    parent_run_id: str | None,
) -> OpenedRun:
    """Continues the run `wanted` or, where the store does not have it, makes one.

    Args:
        uri: address of the store.
        tracking: section `tracking` of the configuration.
        root: folder of all runs.
        name: name of a new run.
        tags: of a new and of a continued run.
        params: of a run that has none yet.
        wanted: id of the run to continue.
        parent_run_id: run that a new one is a child of.

    Raises:
        Exception: whatever MLflow raises.
    """
    client = connect(uri)
    run = _continued(client, wanted) if wanted else None
    if run is None:
        from mlflow.tracking.context.registry import resolve_tags

        experiment_id = _experiment_id(client, tracking.experiment, artifact_location(uri, root))
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        run = client.create_run(experiment_id, tags=resolve_tags(parent), run_name=name)
    write_facts(client, run.info.run_id, tags, {} if run.data.params else params)
    monitor = _start_monitor(uri, run.info.run_id) if tracking.system_metrics else None
    return OpenedRun(client, run.info.experiment_id, run.info.run_id, monitor)


def _continued(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run, marked as running again, or None when the store does not have it (any more)."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run


def _experiment_id(client: "MlflowClient", name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=location, tags=_KIND)
        except MlflowException:  # two runs that start together both find none, and one of them comes second
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def _start_monitor(uri: str, run_id: str) -> "SystemMetricsMonitor":
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def write_facts(client: "MlflowClient", run_id: str, tags: Mapping[str, str], params: Mapping[str, object]) -> None:
    """Writes tags and parameters, as long as MLflow takes them.

    Raises:
        Exception: whatever MLflow raises.
    """
    from mlflow.entities import Param, RunTag

    client.log_batch(
        run_id,
        params=[Param(name, str(value)[:_LONGEST_PARAM]) for name, value in params.items()],
        tags=[RunTag(name, value[:_LONGEST_TAG]) for name, value in tags.items()],
    )
