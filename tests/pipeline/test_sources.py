from pathlib import Path

import pytest

from tests.pipeline.launcher import overrides
from w2s.errors import DataError
from w2s.pipeline.run import run_pipeline

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
