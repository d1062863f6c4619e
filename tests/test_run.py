"""What a run tells of itself."""

from pathlib import Path

from w2s.config.sections import Config
from w2s.run import counted, origins


def test_a_run_is_told_by_its_teacher_where_the_parents_are_gone(tmp_path: Path) -> None:
    gone = f"{tmp_path / 'vision'} and {tmp_path / 'text'}"
    assert origins(Config(), gone) == {"teacher": "efficientnet_lite0", "parent_checkpoint": gone}
    assert origins(Config(stage="eval"), None) == {}


def test_parameters_by_tower() -> None:
    assert counted({"vision.a": (2, 500), "vision.b": (), "text.c": (3,)}) == "1,004 (vision 1,001, text 3)"
