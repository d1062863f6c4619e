"""A run whose checkpoint would run code: nothing takes it up."""

import pickle
from pathlib import Path

import torch

from tests.checkpoint.saved import Harmful, seal_again
from tests.stages.conftest import Refused, Run
from tests.stages.runs import QUIET
from w2s.checkpoint.own.checkpoint_folders import latest


def test_resume_init_and_teacher_refuse_code(
    w2s: Run, refused: Refused, base: list[str], root: Path, tmp_path: Path
) -> None:
    command, mark = ["stage", "mim", *base, *QUIET, "train.steps=1", "optim.warmup=0"], tmp_path / "mark"
    assert w2s(*command, "run.name=harmful")[0] == 0
    (root / "harmful" / "result.json").unlink()  # as if it had been interrupted
    checkpoint = latest(root / "harmful")
    assert checkpoint is not None
    torch.save(Harmful(mark), tmp_path / "common.pt")
    for name, content in (
        (".metadata", pickle.dumps(Harmful(mark))),
        ("common.pt", (tmp_path / "common.pt").read_bytes()),
    ):
        sound = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        seal_again(checkpoint)
        for argument in ("run.name=harmful", "init.vision=harmful", "teacher.source=w2s:harmful"):
            error = refused(*command, argument)
            assert error.startswith(f"error: {checkpoint / name} names posix.mkdir, which is not part of a checkpoint")
        (checkpoint / name).write_bytes(sound)
    assert not mark.exists()
