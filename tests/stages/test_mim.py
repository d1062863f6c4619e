"""The masked stage: what a step computes, and what its checkpoint keeps."""

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.stages.runs import QUIET, history, result, run_stage
from tests.training.loops import start_run
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.load import load
from w2s.config.sections import Config, HardwareConfig, LayerPairConfig, ParallelConfig
from w2s.data.samples.batch import Batch, normalize, require
from w2s.data.stream.stream import Stream
from w2s.errors import ConfigError
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.mim import MaskedStage
from w2s.towers.build import build_clip
from w2s.towers.vision import MEAN, STD
from w2s.training.loop import train

EPS = 1e-6  # of TargetNorm


@pytest.fixture(scope="module")
def config(base: list[str]) -> Config:
    return load("mim", [*base, *QUIET, "run.name=by-hand", "teacher.target_norm=standardize", "optim.warmup=0"])


def batches(config: Config, stage: MaskedStage) -> Iterator[Batch]:
    stream = Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1)
    while True:
        yield stream.next()


def targets_of(stage: MaskedStage, batch: Batch) -> Tensor:
    """The normalised features [16, 16, D] of a first batch, as the stage will make them."""
    source = stage.distillation.teachers[0]
    images = normalize(batch.teacher_images[0], source.teacher.mean, source.teacher.std)
    return copy.deepcopy(source.norm)(source.teacher(images).patches, update=True)


def test_every_image_has_the_exact_number_of_masked_patches(alone: Ranks, config: Config) -> None:
    stage = MaskedStage(config, alone)
    stream = batches(config, stage)
    masks = torch.cat([require(next(stream).masks) for _ in range(4)])
    assert masks.shape == (64, 16)
    assert masks.sum(1).tolist() == [6] * 64
    assert len(masks.unique(dim=0)) > 32


def test_the_loss_is_minus_the_masked_cosine(alone: Ranks, config: Config) -> None:
    """The first step by hand: the teacher on whole images, standardised targets, the student on masked images."""
    stage = MaskedStage(config, alone)
    batch = next(batches(config, stage))
    images, masks = normalize(batch.images, MEAN, STD), require(batch.masks)
    teacher = stage.distillation.teachers[0].teacher
    features = teacher(normalize(batch.teacher_images[0], teacher.mean, teacher.std)).patches.double()
    flat = features.flatten(0, 1)
    targets = (features - flat.mean(0)) / (flat.var(0, correction=0) + EPS).sqrt()
    with torch.no_grad():
        (student,) = stage.student.chunks
        predictions = student(images, masks, torch.arange(masks.shape[1]).expand(16, -1))[0]
    cosines = F.cosine_similarity(predictions.double(), targets, dim=-1)
    by_hand = -sum(cosines[image][masks[image]].mean().item() for image in range(16)) / 16
    assert stage.step(batch)["loss"].item() == pytest.approx(by_hand, rel=0, abs=1e-6)  # float32 against float64
    assert by_hand != pytest.approx(-cosines.mean().item(), abs=1e-3), "unmasked patches have no part in it"


def test_the_logged_loss_is_that_of_the_step_and_the_checkpoint_has_the_statistics(
    alone: Ranks, config: Config, root: Path
) -> None:
    run = start_run(stage := MaskedStage(config, alone), config, root / "by-hand", alone)
    train(run)
    run.tracker.finish("FINISHED")
    fresh = MaskedStage(config, alone)
    stream = batches(config, fresh)
    first = [next(stream) for _ in range(4)]
    assert history(root / "by-hand", "loss")[0] == fresh.step(first[0])["loss"].item()

    seen = torch.cat(
        [fresh.distillation.teachers[0].teacher.features_of(batch.teacher_images[0]).patches for batch in first]
    )
    seen = seen.flatten(0, 1).double()
    again = MaskedStage(config, alone)
    checkpoint = root / "by-hand" / "checkpoints" / "step-00000004"
    extra = state.load(checkpoint, again.towers, again.optimizer, step=4)
    assert extra["count"].item() == len(seen) == 4 * 16 * 16
    torch.testing.assert_close(extra["mean"], seen.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(extra["deviations"], (seen - seen.mean(0)).square().sum(0), rtol=1e-5, atol=0)
    again.load_extra_state(extra)
    assert torch.equal(again.distillation.teachers[0].norm.mean, stage.distillation.teachers[0].norm.mean)


def test_the_final_measures_stand_beside_their_baselines(base: list[str]) -> None:
    options = [*base, "run.name=measured", "tracking.enabled=false", "train.steps=2", "mim.summary_weight=1"]
    metrics = result(run_stage("mim", options))["metrics"]
    for images in ("test", "neighbours"):
        for kind in ("masked", "summary"):
            assert -1 < metrics[f"{images}/{kind}_cosine"] < 1
        for kind in ("constant", "summary_constant"):
            assert 0 < metrics[f"{images}/{kind}_cosine"] < 1
    assert metrics["knn/chance_top1"] == pytest.approx(1 / 24)
    assert metrics["knn/coverage"] == 1.0
    assert {"knn/top1", "knn/top5", "knn_random/top1", "knn_teacher/top1"} <= metrics.keys()


def test_without_masks_the_student_sees_whole_images_and_predicts_all_patches(alone: Ranks, config: Config) -> None:
    stage = MaskedStage(replace(config, mim=replace(config.mim, masked_patches=0)), alone)
    batch = next(batches(config, stage))
    assert batch.masks is None
    targets = targets_of(stage, batch)
    with torch.no_grad():
        (student,) = stage.student.chunks
        predictions = student.lm_head(student.patch_tokens(normalize(batch.images, MEAN, STD)))
    by_hand = -F.cosine_similarity(predictions, targets, dim=-1).mean().item()
    assert stage.step(batch)["loss"].item() == pytest.approx(by_hand, rel=0, abs=1e-6)  # sums in another order


def test_a_student_that_predicts_what_it_sees_sees_nothing_else(alone: Ranks, config: Config) -> None:
    """By hand; and the pixels of the masked patches may be anything."""
    stage = MaskedStage(replace(config, mim=replace(config.mim, predict="visible", loss="mse")), alone)
    batch = next(batches(config, stage))
    masks = require(batch.masks)
    targets = targets_of(stage, batch)[~masks].view(16, 10, -1)
    visible = torch.stack([(~mask).nonzero().flatten() for mask in masks])
    (student,) = stage.student.chunks
    with torch.no_grad():
        tokens = student.encode(normalize(batch.images, MEAN, STD), kept=visible)
        by_hand = F.mse_loss(student.lm_head(tokens[:, 1:]), targets).item()
    hidden = F.interpolate(masks.view(16, 1, 4, 4).float(), size=batch.images.shape[-2:]).bool()
    batch.images = torch.where(hidden, 255 - batch.images, batch.images)
    metrics = stage.step(batch)
    assert metrics["loss"].item() == pytest.approx(by_hand, rel=1e-6)  # sums in another order
    assert -1 < metrics["cosine"].item() < 1
    assert "vision.mask_token" not in {name for name, _ in student.named_parameters()}


def test_predicting_all_is_the_mean_of_masked_and_visible(alone: Ranks, config: Config) -> None:
    stage = MaskedStage(replace(config, mim=replace(config.mim, predict="all")), alone)
    masked = MaskedStage(config, alone)
    batch = next(batches(config, stage))
    (student,), masks, targets = masked.student.chunks, require(batch.masks), targets_of(stage, batch)
    with torch.no_grad():
        (predictions,) = student(normalize(batch.images, MEAN, STD), masks, torch.arange(16).expand(16, -1))
    cosines = F.cosine_similarity(predictions, targets, dim=-1)
    assert stage.step(batch)["loss"].item() == pytest.approx(-cosines.mean().item(), abs=1e-6)
    assert masked.step(batch)["loss"].item() == pytest.approx(-cosines[masks].mean().item(), abs=1e-6)


@pytest.mark.parametrize("summary", ["cls", "pooled"])
def test_the_summary_loss_is_added(alone: Ranks, config: Config, summary: str) -> None:
    """By hand: the class token of the masked image, through the head and the linear to the target's width."""
    plain = MaskedStage(config, alone)
    stage = MaskedStage(replace(config, mim=replace(config.mim, summary_weight=0.25, summary=summary)), alone)
    batch = next(batches(config, stage))
    images, masks, teacher = (
        normalize(batch.images, MEAN, STD),
        require(batch.masks),
        stage.distillation.teachers[0].teacher,
    )
    features = teacher(normalize(batch.teacher_images[0], teacher.mean, teacher.std))
    target = features.summary if summary == "cls" else features.patches.mean(1)
    (student,) = stage.student.chunks
    with torch.no_grad():
        cls = student.encode(images, masks)[:, 0].double()
    embedded = cls @ student.head.weight.double().T @ student.summary_proj.weight.double().T
    cosine = F.cosine_similarity(embedded, target.double(), dim=-1).mean().item()
    metrics, without = stage.step(batch), plain.step(batch)
    assert metrics["summary_cosine"].item() == pytest.approx(cosine, abs=1e-6)  # float32 against float64
    assert metrics["loss"].item() == pytest.approx(without["loss"].item() - 0.25 * cosine, abs=1e-6)
    assert metrics["cosine"].item() == pytest.approx(-without["loss"].item(), abs=1e-6)
    assert metrics["summary_constant_cosine"].item() == pytest.approx(
        F.normalize(target, dim=-1).mean(0).norm().item(), abs=1e-6
    )


def test_without_a_weight_there_is_no_head_and_with_one_of_the_targets_width_no_other(
    alone: Ranks, config: Config
) -> None:
    def names(weight: float, embed_dim: int) -> set[str]:
        model, mim = replace(config.model, embed_dim=embed_dim), replace(config.mim, summary_weight=weight)
        (student,) = MaskedStage(replace(config, model=model, mim=mim), alone).student.chunks
        return {name for name, _ in student.named_parameters()}

    plain = names(0, 64)
    assert names(1, 64) - plain == {"head.weight"}, "the teacher's summary has 64 channels"
    assert names(1, 32) - plain == {"head.weight", "summary_proj.weight"}
    assert not any(name.startswith(("head", "summary_proj")) for name in plain)


def test_the_head_starts_as_that_of_the_contrastive_stage(alone: Ranks, config: Config) -> None:
    mim = replace(config, mim=replace(config.mim, summary_weight=1.0))
    (student,) = MaskedStage(mim, alone).student.chunks
    vision, _ = build_clip(config, torch.float32, alone.device)
    assert torch.equal(student.head.weight, vision.chunks[0].head.weight)


@pytest.mark.parametrize(
    ("options", "kind"),
    [("masked_patches=0", "unmasked"), ("predict=visible", "visible"), ("predict=all", "all")],
)
def test_the_measures_say_of_which_patches_they_are(base: list[str], options: str, kind: str) -> None:
    overrides = [*base, f"run.name={kind}", "tracking.enabled=false", "train.steps=2", f"mim.{options}"]
    metrics = result(run_stage("mim", overrides))["metrics"]
    assert -1 < metrics[f"test/{kind}_cosine"] < 1
    assert "test/masked_cosine" not in metrics


def test_single_layers_learn_single_layers_of_the_teacher(alone: Ranks, config: Config) -> None:
    """Loss, weights and gradients by hand, at the third of four steps, in two micro-batches."""
    layers = [LayerPairConfig(student=1, teacher=5), LayerPairConfig(student=0, teacher=3, weight=0.5)]
    changed = replace(config, mim=replace(config.mim, layers=layers, layers_weight=0.2, loss="smooth_l1"))
    stage = MaskedStage(replace(changed, train=replace(config.train, micro_batch=8)), alone)
    stream = batches(config, stage)
    batch = [next(stream) for _ in range(3)][2]
    masks, teacher, (student,) = require(batch.masks), stage.distillation.teachers[0].teacher, stage.student.chunks
    found = teacher(normalize(batch.teacher_images[0], teacher.mean, teacher.std), [5, 3])
    norms = copy.deepcopy([stage.distillation.teachers[0].norm, *stage.distillation.teachers[0].layer_norms])
    features = [found.patches, *found.layers]
    targets = [norm(each, update=True)[masks].view(16, 6, -1) for norm, each in zip(norms, features, strict=True)]

    outputs = []
    hooks = [each.register_forward_hook(lambda _, __, out: outputs.append(out[0])) for each in student.blocks.layers]
    tokens = student.encode(normalize(batch.images, MEAN, STD), masks)
    for hook in hooks:
        hook.remove()
    first, second = (rows.view(16, 17, -1)[:, 1:][masks].view(16, 6, -1) for rows in outputs)
    heads = student.layer_heads
    losses = [
        F.smooth_l1_loss(student.lm_head(tokens[:, 1:][masks].view(16, 6, -1)), targets[0]),
        F.smooth_l1_loss(heads["1"](second), targets[1]),
        F.smooth_l1_loss(heads["0"](first), targets[2]),
    ]
    by_hand = losses[0] + 0.2 * (1 - 2 / 4) * (losses[1] + 0.5 * losses[2])
    parameters = dict(student.named_parameters())
    stage.optimizer.zero_grad()
    by_hand.backward()  # Megatron's linears add to main_grad and leave nothing for torch.autograd.grad
    gradients = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}

    stage.optimizer.zero_grad()
    metrics = stage.step(batch)
    for name, expected in zip(("loss", "layers/1", "layers/0"), losses, strict=True):
        assert metrics[name].item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in parameters.items():
        theirs = gradients[name]
        assert (parameter.main_grad - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_a_student_starts_from_the_vision_tower_of_another_run_without_its_heads_of_layers(
    base: list[str], root: Path
) -> None:
    layers = ["mim.layers=[{student: 0, teacher: 3}]", "train.steps=1", "optim.warmup=0", "run.name=layers"]
    run_stage("mim", [*base, *QUIET, *layers])
    again = load("mim", [*base, "init.vision=layers"])
    with process_groups.init_distributed(ParallelConfig(), HardwareConfig(device="cpu")) as ranks:
        handover = MaskedStage(again, ranks).begin()
    assert handover is not None
    assert handover.sources == [root / "layers" / "checkpoints" / "step-00000001"]
    assert handover.new == ["vision.lm_head.bias", "vision.lm_head.weight", "vision.mask_token"]
    assert len(handover.loaded) == 23
    assert {name for name in handover.dropped if "layer_heads" in name} == {
        f"vision.layer_heads.0.{name}" for name in ("norm.weight", "linear.weight", "linear.bias")
    }
    export_checkpoint(handover.sources[0], "eva", root / "exported")
    for source in (handover.sources[0], root / "exported" / "tiny.pt"):
        assert not any("layer_heads" in name for name in import_checkpoint(source, again.model, root / "new").loaded)
        shutil.rmtree(root / "new")


def test_a_teacher_without_such_a_layer_is_refused(alone: Ranks, config: Config) -> None:
    layers = [LayerPairConfig(student=0, teacher=99)]
    with pytest.raises(ConfigError, match=r"mim\.layers: the teacher has no layer 99"):
        MaskedStage(replace(config, mim=replace(config.mim, layers=layers)), alone)
