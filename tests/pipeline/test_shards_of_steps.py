import shutil
from pathlib import Path

import pytest

from tests.pipeline.launcher import Launcher, by_stage, overrides
from w2s.errors import DataError
from w2s.pipeline import runner
from w2s.pipeline.runner import run_pipeline

PIPELINE = """\
title: two steps
experiment: two
overrides: [data.builtin=none, data.train={train}, eval.shards=, eval.knn_shards=]
steps:
  - {{name: clip, stage: clip}}
  - {{name: eval, stage: eval, overrides: ["init.checkpoint={{clip}}", "eval.sets={{far: {far}}}"]}}
"""


@pytest.mark.parametrize(("lacking", "key"), [("train", "data.train"), ("far", "eval.sets.far")])
def test_shards_that_any_step_lacks_are_named_before_the_first_one(tmp_path: Path, lacking: str, key: str) -> None:
    folders = {name: tmp_path / name for name in ("train", "far")}
    for name, folder in folders.items():
        folder.mkdir()
        if name != lacking:
            (folder / "0.tar").touch()
    (tmp_path / "two.yaml").write_text(PIPELINE.format(**folders))
    with pytest.raises(DataError, match=f"^{key}=.*{lacking} has no shards"):
        run_pipeline(str(tmp_path / "two.yaml"), overrides(tmp_path / "runs"), ranks=1, fresh=False)
    assert not (tmp_path / "runs").exists()


def test_what_has_finished_needs_its_shards_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {name: tmp_path / name for name in ("train", "far")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "0.tar").touch()
    (tmp_path / "two.yaml").write_text(PIPELINE.format(**folders))
    launcher = Launcher(by_stage)
    monkeypatch.setattr(runner, "launch_stage", launcher)
    reports = []
    for _ in range(2):
        reports.append(run_pipeline(str(tmp_path / "two.yaml"), overrides(tmp_path / "runs"), ranks=1, fresh=False))
        shutil.rmtree(folders["far"], ignore_errors=True)
    assert reports[0] == reports[1]
    assert launcher.steps == ["clip", "eval"]
