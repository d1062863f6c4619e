"""What a run leaves when it ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from w2s.config.sections import Config, TrackingConfig
from w2s.registering import register_clip
from w2s.run import counted, origins


@pytest.mark.parametrize("main", [True, False])
def test_a_registering_that_fails_is_a_warning(main: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks: Any = SimpleNamespace(main=main)
    register_clip(Config(tracking=TrackingConfig(register="mine")), tmp_path, tmp_path / "step-1", ranks)
    printed = capsys.readouterr().out
    assert printed.startswith("warning: tracking.register=mine failed (CheckpointError: ") is main
    assert (f"w2s stage eval init.checkpoint={tmp_path / 'step-1'} tracking.register=mine" in printed) is main
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_told_by_its_teacher_where_the_parents_are_gone(tmp_path: Path) -> None:
    gone = f"{tmp_path / 'vision'} and {tmp_path / 'text'}"
    assert origins(Config(), gone) == {"teacher": "efficientnet_lite0", "parent_checkpoint": gone}
    assert origins(Config(stage="eval"), None) == {}


def test_parameters_by_tower() -> None:
    assert counted({"vision.a": (2, 500), "vision.b": (), "text.c": (3,)}) == "1,004 (vision 1,001, text 3)"
