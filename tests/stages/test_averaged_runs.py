"""Runs that keep a moving average of the weights, and what is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.stages.conftest import Refused, Run
from tests.stages.runs import history, records, result, run_stage
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.export.lineage import lineage, measurements
from w2s.checkpoint.own.checkpoint_folders import checkpoints_of, latest, step_name
from w2s.checkpoint.starts.averaging import average_checkpoints
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.load import load
from w2s.config.sections import TeacherConfig
from w2s.megatron.checkpoint.tensor_store import TensorStore, has_average
from w2s.teachers.build import build_teacher

AVERAGE = ["optim.ema=0.9", "optim.lr=3e-3", "checkpoint.every=2", "checkpoint.keep=4"]
UNTRACKED = ["tracking.enabled=false", "eval.knn_shards=", "eval.baselines=false", "tracking.pictures=0"]
SHARED = ("zero_shot/", "retrieval/")


@pytest.fixture(scope="module")
def options(base: list[str]) -> list[str]:
    return [*base, *UNTRACKED, "init.vision=none"]


@pytest.fixture(scope="module")
def averaged(options: list[str]) -> Path:
    """Four steps, of which the second is saved too; the average is measured."""
    return run_stage("clip", [*options, *AVERAGE, "train.eval_every=2", "eval.weights=ema", "run.name=averaged"])


@pytest.fixture(scope="module")
def plain(options: list[str]) -> Path:
    """The same without an average."""
    off = ["optim.ema=0", "train.eval_every=2", "run.name=plain"]
    return run_stage("clip", [*options, *AVERAGE, *off])


def at(run: Path, step: int) -> Path:
    return checkpoints_of(run) / step_name(step)


def tensors(checkpoint: Path, weights: Any) -> dict[str, Tensor]:
    stored = TensorStore(checkpoint, weights)
    return {name: stored.read(name) for name in stored.meta}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def measured(base: list[str], checkpoint: Path, *more: str) -> dict[str, float]:
    run = run_stage("eval", [*base, *UNTRACKED, f"init.checkpoint={checkpoint}", *more])
    metrics: dict[str, float] = result(run)["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith(SHARED)}


def shared(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(SHARED)}


def test_training_is_the_same_beside_it(averaged: Path, plain: Path) -> None:
    for name in ("loss", "grad_norm", "lr"):
        assert history(averaged, name) == history(plain, name)
    assert equal(tensors(at(averaged, 4), "last"), tensors(at(plain, 4), "last"))
    assert not equal(tensors(at(averaged, 4), "ema"), tensors(at(averaged, 4), "last"))
    assert not has_average(at(plain, 4))


def test_what_is_measured_is_chosen(averaged: Path, plain: Path, base: list[str]) -> None:
    """While training as by the stage that evaluates."""
    for step in (2, 4):
        (logged,) = (shared(each) for each in records(averaged) if each["step"] == step and "loss" not in each)
        (last,) = (shared(each) for each in records(plain) if each["step"] == step and "loss" not in each)
        assert logged != last
        assert logged == measured(base, at(averaged, step), "eval.weights=ema", f"run.name=ema-{step}")
        assert last == measured(base, at(averaged, step), f"run.name=last-{step}")
    by_weights = {weights: [each.run for each in measurements(at(averaged, 4), weights)] for weights in ("last", "ema")}
    assert by_weights == {"last": ["last-4"], "ema": ["averaged", "ema-4"]}


def test_it_resumes_to_the_bit(averaged: Path, options: list[str]) -> None:
    begun = [f"init.checkpoint={at(averaged, 2)}", "run.name=gone-on"]
    run = run_stage("clip", [*options, *AVERAGE, *begun])
    for weights in ("last", "ema"):
        assert equal(tensors(at(run, 4), weights), tensors(at(averaged, 4), weights))


def test_it_may_begin_and_end_with_a_resume(w2s: Run, averaged: Path, plain: Path, options: list[str]) -> None:
    longer = [*options, *AVERAGE, "eval.shards=", "train.steps=5"]
    code, out, _ = w2s("stage", "clip", *longer, f"init.checkpoint={at(plain, 4)}", "run.name=begins")
    assert code == 0
    assert "the moving average begins at the weights of step 4: there was none before" in " ".join(out.split())
    run = plain.with_name("begins")
    first, second, average = (
        tensors(*each) for each in ((at(plain, 4), "last"), (at(run, 5), "last"), (at(run, 5), "ema"))
    )
    decay = (1 + 5) / (10 + 5)  # of the fifth update
    for name, value in average.items():
        # Two roundings to 6e-8 of weights of at most some units.
        torch.testing.assert_close(value, decay * first[name] + (1 - decay) * second[name], rtol=1e-6, atol=1e-6)
    ends = ["optim.ema=0", f"init.checkpoint={at(averaged, 4)}", "run.name=ends"]
    code, out, _ = w2s("stage", "clip", *longer, *ends)
    assert code == 0
    assert "the moving average ends at step 4: optim.ema=0 keeps none" in " ".join(out.split())
    assert not has_average(at(plain.with_name("ends"), 5))


def test_it_is_exported(averaged: Path, tmp_path: Path) -> None:
    for weights in ("last", "ema"):
        export_checkpoint(at(averaged, 4), "safetensors", tmp_path / weights, weights=weights)
    last, ema = (load_file(tmp_path / weights / "model.safetensors") for weights in ("last", "ema"))
    assert last.keys() == ema.keys()
    assert torch.equal(ema["logit_scale"], TensorStore(at(averaged, 4), "ema").read("text.logit_scale"))
    assert not torch.equal(ema["logit_scale"], last["logit_scale"])
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "contrastive run (moving average)" in card
    assert "(moving average)" not in (tmp_path / "last" / "README.md").read_text()


@pytest.mark.slow
def test_it_is_taken_over_and_is_a_teacher(
    w2s: Run, averaged: Path, options: list[str], base: list[str], tmp_path: Path
) -> None:
    """As the weights of its export do."""
    checkpoint = at(averaged, 4)
    model = load("clip", options).model
    export_checkpoint(checkpoint, "safetensors", tmp_path / "out", weights="ema")
    import_checkpoint(tmp_path / "out", model, tmp_path / "in")
    assert equal(tensors(tmp_path / "in", "last"), tensors(checkpoint, "ema"))
    names = [f"init.vision={averaged}", f"init.text={averaged}", "init.weights=ema", "train.steps=2"]
    heir = run_stage("clip", [*options, *names, "run.name=heir"])
    assert shared(records(heir)[0]) == measured(base, checkpoint, "eval.weights=ema", "run.name=ema-again")
    table = json.loads((heir / "tables" / "handover.json").read_text())
    assert table["title"] == f"taken from {checkpoint}, the moving average of {checkpoint}"
    saved = latest(heir)
    assert saved is not None
    assert [each.role for each in lineage(saved)] == ["contrastive run", "began with (moving average), contrastive run"]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = [TeacherConfig(source=f"w2s:{checkpoint}", weights="ema"), TeacherConfig(source=f"w2s:{tmp_path / 'in'}")]
    ours, theirs = (build_teacher(each, grid=4, device="cpu")(images).patches for each in both)
    assert torch.equal(ours, theirs)
    (tmp_path / "texts").write_text("a red circle\n")
    for source, weights in ((checkpoint, "ema"), (tmp_path / "in", "last")):
        out = ["--out", str(tmp_path / f"{weights}.safetensors"), f"eval.weights={weights}", "hardware=cpu"]
        assert w2s("encode", str(source), "--texts", str(tmp_path / "texts"), *out)[0] == 0
    found, expected = (load_file(tmp_path / f"{weights}.safetensors")["text_features"] for weights in ("ema", "last"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("stage", "arguments", "line"),
    [
        ("clip", ["eval.weights=ema"], "eval.weights=ema while training needs an average: set optim.ema"),
        ("clip", ["init.weights=ema"], "init.weights=ema does nothing with init.vision=none and init.text=none"),
        ("clip", ["init.vision={plain}", "init.weights=ema"], "holds no moving average of the weights: train with"),
        ("eval", ["init.checkpoint={plain}", "eval.weights=ema"], "holds no moving average of the weights: train with"),
        ("eval", ["init.checkpoint={plain}", "init.weights=ema"], "init.weights=ema is for stages that train"),
        ("mim", ["teacher.source=w2s:{plain}", "teacher.weights=ema"], "holds no moving average of the weights"),
        ("mim", ["teacher.weights=ema"], "teacher.weights=ema is for w2s:RUN: leave it out with teacher.source=timm:"),
        ("mim", ["optim.ema=1"], "optim.ema=1 must be in [0, 1)"),
    ],
)
def test_what_is_not_there_is_one_line(
    refused: Refused, options: list[str], plain: Path, stage: str, arguments: list[str], line: str
) -> None:
    given = [argument.format(plain=plain) for argument in arguments]
    error = refused("stage", stage, *options, "teacher.image_size=0", *given, "run.name=refused")
    assert line in error


@pytest.mark.slow
def test_a_masked_run_hands_on_the_average_of_its_teacher(averaged: Path, options: list[str]) -> None:
    average = [f"teacher.source=w2s:{averaged}", "teacher.weights=ema", "teacher.image_size=0", "train.steps=2"]
    student = run_stage("mim", [*options, *average, "run.name=student"])
    heir = run_stage(
        "clip", [*options, f"init.vision={student}", "init.text=teacher", "train.steps=2", "run.name=next"]
    )
    teacher, saved = at(averaged, 4), at(heir, 2)
    table = json.loads((heir / "tables" / "handover.json").read_text())
    assert table["title"] == f"taken from {at(student, 2)} and {teacher}, the moving average of {teacher}"
    roles = ["contrastive run", "began with, masked run", "began with (moving average), contrastive run"]
    assert [each.role for each in lineage(saved)] == roles
    assert [each.role for each in lineage(at(student, 2))][1] == "teacher (moving average), contrastive run"


@pytest.fixture(scope="module")
def mean(averaged: Path) -> Path:
    """The mean of the two checkpoints, in the folder that the command takes by itself."""
    made = averaged.with_name("averaged-last-2")
    average_checkpoints(averaged, 2, made)
    return made


def test_the_mean_of_finished_checkpoints(
    w2s: Run, refused: Refused, mean: Path, averaged: Path, options: list[str], tmp_path: Path
) -> None:
    """Equal to the mean in float64; no training continues from it."""
    ask = ["average", "averaged", f"--root={averaged.parent}", "--last"]
    code, out, _ = w2s(*ask, "2", "--out", str(tmp_path / "mean"))
    assert (code, out.count("step-0000000")) == (0, 2)
    assert equal(tensors(mean, "last"), tensors(tmp_path / "mean", "last"))
    second, fourth = (tensors(at(averaged, step), "last") for step in (2, 4))
    expected = {name: ((second[name].double() + fourth[name].double()) / 2).float() for name in second}
    assert equal(tensors(mean, "last"), expected)
    assert [each.role for each in lineage(mean)] == ["average of checkpoints", *["averages, contrastive run"] * 2]
    code, _, error = w2s("stage", "clip", *options, f"init.checkpoint={mean}", "train.steps=9", "run.name=refused")
    assert code == 2
    assert "is of stage average, and clip cannot continue from it: use init.vision to begin with its weights" in error
    for arguments, line in ((["3"], "has only 2"), (["2"], f"--out {mean} exists already")):
        error = refused(*ask, *arguments)
        assert line in error


@pytest.mark.slow
def test_the_mean_is_measured_taken_over_exported_and_is_a_teacher(
    mean: Path, options: list[str], base: list[str], tmp_path: Path
) -> None:
    heir = run_stage("clip", [*options, f"init.vision={mean}", f"init.text={mean}", "train.steps=2", "run.name=heir-2"])
    assert shared(records(heir)[0]) == measured(base, mean, "run.name=of-the-mean")
    export_checkpoint(mean, "safetensors", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["logit_scale"], TensorStore(mean).read("text.logit_scale"))
    teacher = build_teacher(TeacherConfig(source=f"w2s:{mean}"), grid=4, device="cpu")
    assert torch.equal(teacher.network.trunk.cls_token, exported["visual.cls_token"])
