"""A step that all seeds share: one teacher, several students of it."""

from pathlib import Path

import pytest

from tests.pipeline.launcher import overrides
from tests.pipeline.lengths import write_lengths
from w2s.errors import ConfigError
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan


def test_it_runs_once_and_every_seed_builds_on_it(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_lengths(tmp_path, shared="weak")), overrides(tmp_path), fresh=False)
    configs = {task.name: plan.config(task, {}) for task in plan.tasks()}
    assert [name for name in configs if "weak" in name] == ["weak-seed3", "weak_10-seed3", "weak_20-seed3"]
    assert [name for name in configs if name.startswith("start_20")] == ["start_20-seed3", "start_20-seed5"]
    teacher = str(plan.folder.absolute() / "weak_20-seed3")
    assert configs["masked-seed3"].init.vision == configs["masked-seed5"].init.vision == teacher
    assert configs["masked-seed5"].run.seed == 5


def test_its_group_is_another_one(tmp_path: Path) -> None:
    names = [load_pipeline(write_lengths(tmp_path, shared=shared)) for shared in ("", "weak")]
    groups = {Plan(pipeline, overrides(tmp_path), fresh=False).group for pipeline in names}
    assert len(groups) == 2


def test_it_cannot_build_on_what_each_seed_has_of_its_own(tmp_path: Path) -> None:
    path = Path(write_lengths(tmp_path, shared="start"))
    path.write_text(path.read_text().replace("name: masked", "name: masked\n    shared: true"))
    with pytest.raises(ConfigError, match="masked: it is shared by all seeds and builds on weak_20, which has one run"):
        load_pipeline(str(path))
