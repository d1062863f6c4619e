"""A run that continues from a checkpoint of another one: a trunk, branches of it, and what does not fit."""

import re
from pathlib import Path

import pytest

from tests.stages.conftest import Refused
from tests.stages.runs import QUIET, history, run_stage
from w2s.checkpoint.own.checkpoint_folders import latest, read_meta
from w2s.config.load import load
from w2s.launch import run_stage as run_as_rank
from w2s.processes.elastic import launch

CONSTANT = ["optim.schedule=constant", "optim.cooldown=0"]
STAGES = {
    "mim": ["teacher.target_norm=standardize"],
    "clip": ["init.vision=none", "optim.name=lamb", "optim.lr=1e-3"],
}


@pytest.fixture(scope="module", params=list(STAGES))
def trunk(request: pytest.FixtureRequest, base: list[str]) -> tuple[str, list[str], Path]:
    """Eight steps at a constant rate, of which the fourth is kept."""
    stage = request.param
    options = [*base, *QUIET, *STAGES[stage]]
    keep = ["checkpoint.every=3", "checkpoint.keep=1", "checkpoint.keep_at=[4]"]
    return stage, options, run_stage(stage, [*options, *CONSTANT, *keep, "train.steps=8", f"run.name={stage}-trunk"])


def branch(trunk: Path, step: int = 4) -> str:
    return f"init.checkpoint={trunk}/checkpoints/step-{step:08d}"


COOLED = ["optim.schedule=constant", "optim.cooldown=0.4", "train.steps=7", "optim.min_lr=0.1"]


def test_a_branch_is_a_run_of_its_own_length_bit_for_bit(trunk: tuple[str, list[str], Path]) -> None:
    stage, options, folder = trunk
    whole = run_stage(stage, [*options, *COOLED, f"run.name={stage}-whole"])
    part = run_stage(stage, [*options, *COOLED, branch(folder), f"run.name={stage}-branch"])
    assert history(part, "step") == [5, 6, 7]
    for name in ("step", "samples_seen", "loss", "grad_norm", "lr"):
        assert history(part, name) == history(whole, name)[4:], name
    assert history(part, "lr")[-1] < history(part, "lr")[0], "it cools down"
    assert history(whole, "loss")[:4] == history(folder, "loss")[:4]
    saved = latest(part)
    assert saved is not None
    assert read_meta(saved).parent == str(folder / "checkpoints" / "step-00000004")


@pytest.mark.slow
def test_a_finished_run_continues_with_other_rates_in_another_layout(
    trunk: tuple[str, list[str], Path], root: Path
) -> None:
    stage, options, folder = trunk
    more = [f"init.checkpoint={folder.name}", "train.steps=11", *CONSTANT, "optim.vision_layer_decay=0.7"]
    alone = run_stage(stage, [*options, *more, f"run.name={stage}-more"])
    assert history(alone, "step") == [9, 10, 11]
    layout = ["parallel.pipeline=2", "train.micro_batch=8", f"run.name={stage}-more-split"]
    launch(run_as_rank, load(stage, [*options, *more, *layout]), 2)
    # Float32 sums in another order.
    assert history(root / f"{stage}-more-split", "loss") == pytest.approx(history(alone, "loss"), rel=1e-5)
    straight = run_stage(stage, [*options, *CONSTANT, "train.steps=11", f"run.name={stage}-straight"])
    assert history(straight, "loss")[8] == history(alone, "loss")[0]
    assert history(straight, "loss")[9:] != history(alone, "loss")[1:], "the rates of the lower layers are others"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=4", "has done 4 steps, which train.steps=4 counts too: use more"),
        ("model.vision.width=64", "is of another model (model=tiny): "),
        (
            "train.global_batch=32",
            "cannot continue with train.global_batch=32: the run began with train.global_batch=16",
        ),
        ("run.seed=1", "cannot continue with run.seed=1: the run began with run.seed=0"),
    ],
)
def test_what_does_not_fit_is_one_line(
    refused: Refused, trunk: tuple[str, list[str], Path], override: str, line: str
) -> None:
    stage, options, folder = trunk
    error = refused("stage", stage, *options, "train.steps=8", branch(folder), "run.name=misfit", override)
    assert line in error


def test_another_stage_is_one_line(refused: Refused, base: list[str], trunk: tuple[str, list[str], Path]) -> None:
    stage, _, folder = trunk
    other = {"mim": "clip", "clip": "mim"}[stage]
    error = refused("stage", other, *base, *QUIET, "train.steps=8", branch(folder), "run.name=misfit")
    assert re.search(rf"is of stage {stage}, and {other} cannot continue from it", error)
