"""A teacher beside the contrastive loss: what it adds to a step, when it is let go, and runs that are interrupted."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives.pairs import softmax_definition
from tests.objectives.test_distillation_loss import definition
from tests.stages.runs import QUIET, history, records, run_stage
from w2s.config.checks import check
from w2s.config.load import load
from w2s.data.samples.batch import require
from w2s.data.stream.stream import Stream
from w2s.errors import ConfigError, StopRun
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.clip import ContrastiveStage, encode_image, encode_text
from w2s.teachers.distillation.contrastive import ContrastiveDistillation
from w2s.training import training_run

TEACHER = ["init.vision=none", "clip.distill.source=eva:tiny"]
"""A CLIP with random weights, of the student's shape, seen at 64 px."""
RECALL = "retrieval/mean_recall_at_10"


@pytest.fixture(scope="module")
def options(base: list[str]) -> list[str]:
    return [*base, *TEACHER, "tracking.enabled=false"]


Definition = Callable[[list[Tensor], list[Tensor], Tensor, Tensor], Tensor]
"""Takes the student's and the teacher's embeddings in float64, and the scales of both."""


def feature(student: list[Tensor], teacher: list[Tensor], scale: Tensor, teacher_scale: Tensor) -> Tensor:
    return sum((s - t).square().sum(1).mean() for s, t in zip(student, teacher, strict=True))


def affinity(student: list[Tensor], teacher: list[Tensor], scale: Tensor, teacher_scale: Tensor) -> Tensor:
    return definition(*student, scale, *teacher, teacher_scale)


CASES: dict[str, tuple[list[str], Definition]] = {
    "feature": (["clip.distill.kind=feature"], feature),
    "images' features": (
        ["clip.distill.kind=feature", "clip.distill.towers=image"],
        lambda student, teacher, *scales: feature(student[:1], teacher[:1], *scales),
    ),
    "affinity": (["clip.distill.kind=affinity"], affinity),
    "affinity of captions": (
        ["clip.distill.kind=affinity", "clip.distill.towers=text"],
        lambda student, teacher, *scales: affinity([student[0].detach(), student[1]], teacher, *scales),
    ),
    "both": (["clip.distill.kind=both"], lambda *pair: feature(*pair) + affinity(*pair)),
}


@pytest.mark.parametrize("split", [[], ["clip.tile=5", "train.micro_batch=4"]], ids=["one pass", "two passes"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_naive_sum_in_float64(alone: Ranks, options: list[str], name: str, split: list[str]) -> None:
    """Losses and gradients of both towers, with patch dropout, which the teacher knows nothing of."""
    chosen, by_hand = CASES[name]
    config = load("clip", [*options, *chosen, *split, "clip.distill.weight=0.7", "clip.equal_captions=negatives"])
    stage = ContrastiveStage(config, alone)
    batch = Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1).next()
    stage.optimizer.zero_grad()
    found = stage.step(batch)
    towers = [part for tower in stage.towers.values() for part in tower.chunks]
    gradients = [parameter.main_grad.clone() for part in towers for parameter in part.parameters()]

    stage.optimizer.zero_grad()
    (vision,), (text,) = stage.vision.chunks, stage.text.chunks
    student = [F.normalize(x.double(), dim=-1) for x in (encode_image(vision, batch), encode_text(text, batch))]
    teacher = [
        torch.zeros(16, 16) if x is None else x.double()
        for x in stage.teachers[0](*batch.teacher_images or [None], batch.tokens)
    ]
    scale, teacher_scale = text.logit_scale.double().exp(), torch.tensor(1 / 0.07).double()
    contrastive, distance = softmax_definition(*student, scale), by_hand(student, teacher, scale, teacher_scale)
    (contrastive + 0.7 * distance).backward()

    assert found["loss"].item() == pytest.approx(contrastive.item(), rel=1e-5)
    assert found["distill_loss"].item() == pytest.approx(distance.item(), rel=1e-5)
    expected = [parameter.main_grad for part in towers for parameter in part.parameters()]
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def weights(options: list[str], ranks: Ranks, *changes: str) -> list[float]:
    config = load("clip", [*options, *changes, "train.steps=8"])
    distillation, found = ContrastiveDistillation(config, *config.stage_teachers, ranks), []
    for step in range(8):
        distillation.step = step
        found.append(distillation.weight if distillation.on else 0.0)
    return found


def test_the_weight_goes_down_to_zero_over_the_first_steps(alone: Ranks, options: list[str]) -> None:
    half = [*options, "clip.distill.until=0.5", "clip.distill.weight=2"]
    assert weights(half, alone) == [2, 2, 2, 2, 0, 0, 0, 0]
    assert weights(half, alone, "clip.distill.decay=linear") == [2, 1.5, 1, 0.5, 0, 0, 0, 0]
    cosine = weights(half, alone, "clip.distill.decay=cosine")
    assert cosine == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0, 0, 0, 0])


def stopped_after(step: int, patch: pytest.MonkeyPatch, options: list[str]) -> None:
    """Run up to a step, after which the run is told to stop."""
    genuine = training_run.train_step

    def train_step(stage: ContrastiveStage, *arguments: Any) -> dict[str, Tensor]:
        metrics = genuine(stage, *arguments)
        if stage.distillation is not None and stage.distillation.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    with patch.context() as during, pytest.raises(StopRun):
        during.setattr(training_run, "train_step", train_step)
        run_stage("clip", options)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_stopped_around_the_switch_resumes_bit_for_bit(
    options: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The teacher is let go after the third of six steps."""
    until = [*options, *QUIET, "train.steps=6", "clip.distill.until=0.5", "clip.distill.decay=linear"]
    whole = run_stage("clip", [*until, f"run.name=switch-{step}-whole"])
    broken = [*until, f"run.name=switch-{step}-broken", "checkpoint.every=100"]
    stopped_after(step, monkeypatch, broken)
    run_stage("clip", broken)
    for name in ("step", "loss", "distill_loss", "grad_norm"):
        assert history(root / f"switch-{step}-broken", name) == history(whole, name), name
    assert [record["step"] for record in records(whole) if "distill_loss" in record] == [1, 2, 3]


def test_a_teacher_is_dropped_once_the_student_passes_it(
    options: list[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes at the evaluation after the second of six steps, at which its checkpoint is saved too."""
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.1, 0.1])
    until = [*options, "train.steps=6", "clip.distill.until_better=true", "train.eval_every=1", "eval.knn_shards="]

    def judged(self: ContrastiveDistillation, student: dict[str, float], measure: Any) -> dict[str, float]:
        return real(self, {RECALL: next(scores, 0.0)}, lambda _: {RECALL: 0.4})

    real = ContrastiveDistillation.judge
    monkeypatch.setattr(ContrastiveDistillation, "judge", judged)
    whole = run_stage("clip", [*until, "run.name=better-whole"])
    scores = iter([0.1, 0.3, 0.9])
    broken = [*until, "run.name=better-broken", "checkpoint.every=2"]
    stopped_after(2, monkeypatch, broken)
    scores = iter(())  # nobody is asked again
    run_stage("clip", broken)
    for run in (whole, root / "better-broken"):
        assert [record["step"] for record in records(run) if "distill_loss" in record] == [1, 2]
    for name in ("loss", "distill_loss", "grad_norm"):
        assert history(root / "better-broken", name) == history(whole, name), name


def test_the_teacher_is_measured_on_the_test_images(alone: Ranks, options: list[str]) -> None:
    """A teacher that is the student is not passed by it; by the same scores."""
    ahead = ["clip.distill.until_better=true", "train.eval_every=1", "eval.knn_shards=", "teacher.image_size=0"]
    stage = ContrastiveStage(load("clip", [*options, *ahead]), alone)
    metrics = stage.evaluate()
    assert stage.distillation is not None
    assert stage.distillation.on == (metrics[RECALL] <= metrics[f"teacher/{RECALL}"])
    assert 0 < metrics[f"teacher/{RECALL}"] < 1
    stage.distillation.passed = False
    assert stage.distillation.judge({RECALL: metrics[f"teacher/{RECALL}"]}, stage.evaluator.measure_teacher)
    assert stage.distillation.on, "as good is not better"


def test_no_teacher_image_is_made_that_nobody_sees(alone: Ranks, options: list[str]) -> None:
    config = load("clip", [*options, "train.steps=4", "clip.distill.until=0.5"])
    stream = Stream(config.data, ContrastiveStage(config, alone).spec, global_batch=16, seed=0, rank=0, size=1)
    sizes = [batch.teacher_images for batch in (stream.next() for _ in range(4))]
    assert [[view.shape[-1] for view in views] for views in sizes] == [[64], [64], [], []]
    captions = load("clip", [*options, "clip.distill.kind=feature", "clip.distill.towers=text"])
    assert ContrastiveStage(captions, alone).spec.teacher_sizes == ()


@pytest.fixture(scope="module")
def weak(base: list[str]) -> str:
    """A run of ours, by its name."""
    return run_stage("clip", [*base, *QUIET, "init.vision=none", "run.name=weak", "train.steps=2"]).name


def test_a_run_of_ours_is_a_teacher_as_it_is(base: list[str], weak: str, alone: Ranks) -> None:
    """`teacher` is what teacher.source names."""
    config = load("clip", [*base, f"teacher.source=w2s:{weak}", "clip.distill.source=teacher", "teacher.image_size=0"])
    assert config.stage_teachers == (config.teacher,)
    stage = ContrastiveStage(config, alone)
    batch = Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1).next()
    images, texts = stage.teachers[0](*batch.teacher_images or [None], batch.tokens)
    assert require(images).norm(dim=1).tolist() == pytest.approx([1] * 16, abs=1e-5)
    assert require(texts).shape == (16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["clip.distill.source=timm:test_vit"], "has no text tower: use a CLIP"),
        (
            ["clip.distill.kind=both", "model.embed_dim=24"],
            r"embeddings have 16 channels and model\.embed_dim=24: use clip\.distill\.kind=affinity",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(options: list[str], alone: Ranks, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ContrastiveStage(load("clip", [*options, *changes]), alone)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["clip.distill.source=none", "clip.distill.weight=2"], r"clip\.distill\.weight=2 does nothing"),
        (["clip.distill.until_better=true"], "give eval.shards and a train.eval_every above 0"),
        (["clip.distill.until=0"], r"clip\.distill\.until=0 must be in \(0, 1\]"),
        (["teacher.sharded=true"], r"teacher\.source=eva:tiny: only w2s:RUN can be split"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(load("clip", [*options, "train.eval_every=0", *changes]), 1, 1)


def test_a_width_is_no_matter_to_affinities(options: list[str], alone: Ranks) -> None:
    config = load("clip", [*options, "model.embed_dim=24"])
    stage = ContrastiveStage(config, alone)
    batch = Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1).next()
    assert stage.step(batch)["distill_loss"].item() > 0
