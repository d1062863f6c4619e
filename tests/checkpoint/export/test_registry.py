"""A finished CLIP in MLflow's registry."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from w2s.checkpoint.export.registry import register_clip
from w2s.config.sections import Config, TrackingConfig


@pytest.mark.parametrize("main", [True, False])
def test_a_registering_that_fails_is_a_warning(main: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks: Any = SimpleNamespace(main=main)
    register_clip(Config(tracking=TrackingConfig(register="mine")), tmp_path, tmp_path / "step-1", ranks)
    printed = capsys.readouterr().out
    assert printed.startswith("warning: tracking.register=mine failed (CheckpointError: ") is main
    assert (f"w2s stage eval init.checkpoint={tmp_path / 'step-1'} tracking.register=mine" in printed) is main
    assert list(tmp_path.iterdir()) == []
