"""A run whose checkpoint would run code: nothing takes it up."""

import pickle
from pathlib import Path

import torch

from tests.checkpoint.saved import Harmful, seal_again
from tests.stages.conftest import Run
from tests.stages.runs import QUIET
from w2s.checkpoint.own.checkpoint_folders import latest


def test_resume_init_and_teacher_refuse_code(w2s: Run, base: list[str], root: Path, tmp_path: Path) -> None:
    command, mark = ["stage", "mim", *base, *QUIET, "train.steps=1", "optim.warmup=0"], tmp_path / "mark"
    assert w2s(*command, "run.name=harmful")[0] == 0
    (root / "harmful" / "result.json").unlink()  # as if it had been interrupted
    checkpoint = latest(root / "harmful")
    assert checkpoint is not None
    sound, common = (checkpoint / ".metadata").read_bytes(), checkpoint / "common.pt"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Harmful(mark)))
    seal_again(checkpoint)
    for arguments in (["run.name=harmful"], ["init.vision=harmful"], ["teacher.source=w2s:harmful"]):
        code, _, error = w2s(*command, *arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {checkpoint}/.metadata names posix.mkdir, which is not part of a checkpoint")
    (checkpoint / ".metadata").write_bytes(sound)
    torch.save(Harmful(mark), common)
    seal_again(checkpoint)
    for arguments in (["run.name=harmful"], ["init.vision=harmful"], ["teacher.source=w2s:harmful"]):
        code, _, error = w2s(*command, *arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {common} names posix.mkdir, which is not part of a checkpoint")
    assert not mark.exists()
