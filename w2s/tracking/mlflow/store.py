"""The MLflow store: where it is, and a client that gives up soon when nobody answers there."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from w2s.config.sections import TrackingConfig
from w2s.redaction import redact

if TYPE_CHECKING:  # importing MLflow takes seconds, and a rank that does not log never needs it
    from mlflow import MlflowClient

OPEN_SECONDS = 15.0
"""Longest wait for a store that does not answer."""

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # MLflow's own 120 s and 7 retries would hold a run up for a quarter of an hour
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def tracking_uri(tracking: TrackingConfig, root: Path) -> str:
    """The store's address: the configured one, or MLFLOW_TRACKING_URI, or sqlite in the folder of all runs."""
    return tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.absolute() / 'mlflow.db'}"


def artifact_location(uri: str, root: Path) -> str | None:
    """Where a new experiment keeps its files: beside the runs for a database, else as the server decides (None).

    A database store would otherwise put them into the current folder.
    """
    is_database = uri.split(":")[0].split("+")[0] in _DATABASES
    return (root.absolute() / "mlflow-artifacts").as_uri() if is_database else None


def load_mlflow() -> None:
    """Imports MLflow with short time limits, no telemetry and no log lines; variables that the user set stay."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # only its effects are wanted: it reads the variables and sets up its loggers

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)


def connect(uri: str) -> "MlflowClient":
    """A client for a store.

    Raises:
        Exception: whatever MLflow raises for an address that it cannot use.
    """
    load_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def root(error: BaseException) -> BaseException:
    """The error that MLflow and its libraries have wrapped in others."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def reason(error: BaseException) -> str:
    """Why it failed, in one line: the error at the root, which MLflow wraps in long messages of its own."""
    error = root(error)
    lines = str(error).strip().splitlines() or [""]
    return redact(f"{type(error).__name__}: {lines[0]}")[:220]
