"""The cycle: the CLIP that a student has become is the next student's teacher, whole or split over ranks."""

from pathlib import Path

import pytest
import torch

from tests.stages.conftest import Run
from tests.stages.runs import QUIET, history, run_stage
from w2s.checkpoint.find import find_any
from w2s.checkpoint.own.checkpoint_folders import latest
from w2s.checkpoint.weights.released import open_released
from w2s.config.load import load
from w2s.launch import run_stage as run_as_rank
from w2s.processes.elastic import launch

ABSOLUTE = 1e-6
"""Of losses between 0.1 and 2, in float32, whose sums come in another order."""


@pytest.fixture(scope="module")
def cycle(base: list[str]) -> tuple[Path, list[str]]:
    """A CLIP of the tiny model, and the options of a wider student that learns from it for three steps."""
    clip = run_stage("clip", [*base, *QUIET, "init.vision=none", "run.name=small-clip"])
    student = [
        "model.vision.width=64",
        "model.vision.layers=3",
        "teacher.source=w2s:small-clip",
        "teacher.image_size=0",
    ]
    return clip, [*base, *QUIET, *student, "train.steps=3", "optim.lr=1e-4"]


def test_a_finished_clip_run_is_the_teacher_of_the_next_student(cycle: tuple[Path, list[str]]) -> None:
    _, options = cycle
    run = run_stage("mim", [*options, "run.name=student"])
    checkpoint = latest(run)
    assert checkpoint is not None
    # the student's head takes the width of the shared space by itself
    assert open_released(checkpoint).meta["visual.lm_head.weight"].shape == (16, 64)
    assert len(history(run, "loss")) == 3


@pytest.mark.slow
def test_the_teacher_may_be_split_over_tensor_parallel_ranks(cycle: tuple[Path, list[str]], root: Path) -> None:
    _, options = cycle
    whole = run_stage("mim", [*options, "run.name=whole"])
    layout = ["parallel.tensor=2", "teacher.sharded=true", "run.name=split", "data.workers=1"]
    launch(run_as_rank, load("mim", [*options, *layout]), 2)
    assert history(root / "split", "loss") == pytest.approx(history(whole, "loss"), rel=0, abs=ABSOLUTE)


def test_a_student_can_start_from_a_file_that_a_run_was_exported_to(
    cycle: tuple[Path, list[str]], base: list[str], w2s: Run, root: Path, tmp_path: Path
) -> None:
    clip, _ = cycle
    folder = tmp_path / "exported"
    assert w2s("export", "small-clip", "--format", "eva", "--out", str(folder), "--root", str(root))[0] == 0
    file = folder / "tiny.pt"
    options = [*base, *QUIET, "train.steps=2", "optim.lr=1e-4"]
    runs = [
        run_stage("clip", [*options, f"init.vision={source}", f"init.text={source}", f"run.name={name}"])
        for name, source in (("from-run", str(clip)), ("from-file", str(file)))
    ]
    assert history(runs[0], "loss") == history(runs[1], "loss")
    assert torch.equal(
        open_released(find_any("from-run", root, key="x")).read("visual.head.weight"),
        open_released(find_any("from-file", root, key="x")).read("visual.head.weight"),
    )
