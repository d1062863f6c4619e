import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from w2s.config.sections import Config, RunConfig, TrackingConfig, TrainConfig
from w2s.tracking.mlflow.store import connect


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs; a copy of it is at hand much sooner than a new one."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs with the default store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    folder = tmp_path / "runs"
    folder.mkdir()
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def client(root: Path) -> MlflowClient:
    return connect(f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture
def config(root: Path) -> Config:
    """A configuration whose runs go to `root`; system metrics are left out, their thread only costs time here."""
    return Config(
        run=RunConfig(root=str(root)), train=TrainConfig(steps=40), tracking=TrackingConfig(system_metrics=False)
    )
