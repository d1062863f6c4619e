import pytest

from tests.pipeline.launcher import Launcher, by_stage
from tests.tracking.conftest import client, empty_store, root  # noqa: F401
from w2s.pipeline import runner


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    launcher = Launcher(by_stage)
    monkeypatch.setattr(runner, "launch_stage", launcher)
    monkeypatch.setattr(runner, "find_shards", lambda configs: None)  # nothing is read
    return launcher
