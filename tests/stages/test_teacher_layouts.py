"""Teachers of all samples or of a part: the numbers of every layout, of an interrupted run, and what each rank does."""

import signal
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.mim import MaskedStage
from tests.distributed import run_ranks
from tests.stages.conftest import Material
from tests.stages.layout_steps import Steps, run_alone, run_layouts
from tests.stages.runs import QUIET, history, killed_at_each_update, records, run_stage
from tests.stages.test_layouts import PIPELINE, RELATIVE, TENSOR, relative_error
from w2s.config.load import load
from w2s.config.sections import Config, ParallelConfig
from w2s.data.samples.batch import normalize, require
from w2s.data.stream.stream import Stream
from w2s.errors import ConfigError, StopRun
from w2s.megatron.parallel import process_groups
from w2s.objectives.masked_loss import masked_cosines
from w2s.planning.model.teacher import planned_teachers, sample_flops
from w2s.teachers.distillation.teacher_draw import TeacherDraw
from w2s.towers.masked_student import masked_patch_indices, outputs_of
from w2s.towers.vision import channel_statistics

STEPS = 3
ONE = ["teachers.draw=one", "teachers.vit.share=2"]
LAYERS = ["mim.layers=[{student: 1, teacher: 1}]", "mim.layers_weight=1"]
LAYOUTS = {
    "data": ["train.micro_batch=4"],
    "tensor": [TENSOR],
    "pipeline": [PIPELINE, "train.micro_batch=4"],
    "fully sharded": ["parallel.shard=full", "train.micro_batch=8"],
}


@pytest.fixture(scope="module")
def sources(material: Material) -> list[str]:
    """Two sources, of which the CLIP is a teacher of the second alone."""
    halves = [f"{material.train}/00000{{{first}..{first + 3}}}.tar" for first in (0, 4)]
    mix = [f"data.train={'::'.join(halves)}", "data.weights=[0.6,0.4]", "data.lanes=4"]
    return [*mix, "teachers.clip.sources=[train-2]"]


@pytest.fixture(scope="module")
def variants(common: list[str], two: str, sources: list[str]) -> dict[str, list[str]]:
    return {
        "all": [*common, two],
        "one": [*common, two, *ONE, *LAYERS],
        "sources": [*common, two, *sources],
        "one of sources": [*common, two, *sources, *ONE, "teachers.clip.target_norm=standardize"],
    }


@pytest.fixture(scope="module")
def whole(variants: dict[str, list[str]]) -> Mapping[str, Steps]:
    """All variants on one process in one micro-batch."""
    with process_groups.init_distributed(ParallelConfig(), load("mim", ["hardware=cpu"]).hardware) as ranks:
        return {name: run_alone(load("mim", options), ranks, STEPS) for name, options in variants.items()}


def test_every_layout_has_the_numbers_of_one_process(
    whole: Mapping[str, Steps], variants: dict[str, list[str]]
) -> None:
    """Losses, which are sums of terms near 1, gradients, statistics of the targets, and means by teacher."""
    cases = {
        f"{name}, {layout}": ("mim", [*options, *changes])
        for name, options in variants.items()
        for layout, changes in LAYOUTS.items()
        if not (layout == "fully sharded" and name == "one")  # which has a loss at a layer
    }
    for name, steps in run_layouts(2, cases, STEPS).items():
        alone = whole[name.rpartition(", ")[0]]
        assert steps.losses == pytest.approx(alone.losses, abs=RELATIVE), name
        error, where = relative_error(steps.gradients, alone.gradients)
        assert error < RELATIVE, f"{name}: gradient of {where} is off by {error:.1e}"
        assert steps.extra.keys() == alone.extra.keys()
        for key, value in alone.extra.items():
            # A rotation has eigenvectors, which are found to a few more roundings.
            torch.testing.assert_close(steps.extra[key], value, rtol=1e-5, atol=1e-5)
        shares = () if name.startswith("all") else ("vit/share", "clip/share")
        for metric in (*shares, "vit/cosine", "clip/cosine", "clip/loss", "vit/summary_cosine"):
            ours, theirs = ([step[metric] for step in each.reports] for each in (steps, alone))
            assert ours == pytest.approx(theirs, abs=RELATIVE), (name, metric)
        if shares and "data" not in name and "sharded" not in name:
            pairs = 16 * sum(alone.reports[0][f"{teacher}/share"] for teacher in ("vit", "clip"))
            assert 2 * steps.teacher_images == pytest.approx(pairs), "each image is shown to its teachers once"
    assert all(len(set(steps.losses)) == STEPS for steps in whole.values())
    assert all(float(gradient.abs().max()) > 0 for gradient in whole["all"].gradients.values())
    heads = {name.split(".")[3] for name in whole["all"].gradients if name.startswith("vision.teachers.clip.")}
    assert heads == {"lm_head", "head"}


def test_statistics_are_of_the_samples_that_a_teacher_has(
    whole: Mapping[str, Steps], variants: dict[str, list[str]]
) -> None:
    """16 features of each sample, in three steps."""
    for name in ("one", "one of sources"):
        draw = TeacherDraw.of(load("mim", variants[name]))
        assert draw is not None
        samples = sum(np.count_nonzero(draw.drawn(np.arange(16 * step, 16 * step + 16))[:, 0]) for step in range(STEPS))
        assert 0 < samples < 16 * STEPS
        assert whole[name].extra["count"] == 16 * samples


@pytest.fixture
def stage(alone: process_groups.Ranks, common: list[str], two: str) -> MaskedStage:
    return MaskedStage(load("mim", [*common, two, *ONE, "teachers.clip.target_norm=standardize"]), alone)


def test_a_teacher_is_measured_on_its_samples(stage: MaskedStage) -> None:
    """The mean over them, in the loss too; where it has none in a step, its metrics are 0."""
    config, (part,) = stage.config, stage.student.chunks
    with closing(Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1)) as stream:
        batch = stream.next()
    assert stage.distillation.draw is not None
    has, vit = stage.distillation.draw.drawn(batch.indices.numpy())[:, 0] > 0, stage.distillation.teachers[0]
    mixed = stage.step(batch)
    masks = require(batch.masks)
    with torch.no_grad():
        predictions = part(
            normalize(batch.images, *channel_statistics(config.model.vision)), masks, masked_patch_indices(masks, 6)
        )
        summary = vit.summary(vit.encode(batch.teacher_images[stage.distillation.image_sizes.index(64)], 16))
    cosines = masked_cosines(require(outputs_of(predictions, stage.distillation.targets)[0].summary), require(summary))
    assert mixed["vit/summary_cosine"].item() == pytest.approx(cosines[torch.from_numpy(has)].mean().item(), abs=1e-6)
    assert mixed["vit/summary_cosine"].item() != pytest.approx(cosines.mean().item(), abs=1e-4)
    assert mixed["vit/share"].item() == has.mean()
    assert mixed["loss"].item() == pytest.approx((mixed["vit/loss"] + 0.5 * mixed["clip/loss"]).item(), abs=1e-6)
    stage.distillation.draw = replace_chances(stage.distillation.draw, [1.0, 0.0])
    only = stage.step(batch)
    assert only["loss"] == only["vit/loss"]
    assert only["vit/share"] == 1 and only["clip/share"] == only["clip/loss"] == only["clip/cosine"] == 0
    assert all(np.isfinite(value.item()) for value in only.values())


def replace_chances(draw: TeacherDraw, chances: list[float]) -> TeacherDraw:
    draw.chances[:] = chances
    return draw


def teachers_flops(config: Config) -> float:
    """Operations of the teachers of this rank in a step."""
    costs, seen = planned_teachers(config), [0.0]
    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        stage = MaskedStage(config, ranks)
        for teacher, planned in zip(stage.teachers, costs, strict=True):
            teacher.register_forward_hook(lambda _, inputs, __, cost=planned.flops: seen.append(cost * len(inputs[0])))
        with closing(
            Stream(config.data, stage.spec, global_batch=16, seed=0, rank=ranks.data_reader_rank, size=2)
        ) as stream:
            stage.step(stream.next())
    return sum(seen)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
@pytest.mark.parametrize("draw", [[], [*ONE, "teachers.clip.target_norm=standardize"]], ids=["all", "one"])
def test_the_ranks_of_a_group_share_the_work(common: list[str], two: str, draw: list[str], layout: str) -> None:
    """No rank has more than 1.1 times the mean of the teachers' FLOPs, and no image is shown to a teacher twice."""
    work = run_ranks(teachers_flops, 2, load("mim", [*common, two, *draw, layout, "train.micro_batch=4"]))
    config = load("mim", [*common, two, *draw])
    teacher_draw, (vit, clip) = TeacherDraw.of(config), planned_teachers(config)
    of_vit, of_clip = teacher_draw.in_first_batch() if teacher_draw else (16, 16)
    assert sum(work) == of_vit * vit.flops + of_clip * clip.flops
    assert max(work) <= 1.1 * sum(work) / len(work)
    shares = (2 / 3, 1 / 3) if draw else (1, 1)
    assert sample_flops([vit, clip]) == pytest.approx(shares[0] * vit.flops + shares[1] * clip.flops)


def test_an_interrupted_run_resumes_bit_for_bit(base: list[str], root: Path, two: str) -> None:
    options = [*(each for each in base if not each.startswith("teacher.")), *QUIET, two, *ONE]
    options += ["mim.summary_weight=1", "mim.layers=[{student: 0, teacher: 3}]", "mim.layers_until=0.75"]
    run_stage("mim", [*options, "run.name=drawn-whole"])
    broken = [*options, "run.name=drawn-broken", "checkpoint.every=100"]
    with killed_at_each_update(signal.SIGTERM), pytest.raises(StopRun):
        run_stage("mim", broken)
    run_stage("mim", broken)
    whole, again = (root / f"drawn-{name}" for name in ("whole", "broken"))
    for name in ("step", "loss", "grad_norm", "layers/0", "clip/loss", "vit/cosine", "vit/share"):
        assert history(again, name) == history(whole, name), name
    assert len(set(history(whole, "vit/share"))) > 1, "the numbers differ from step to step"


def test_nothing_is_logged_of_a_teacher_in_a_step_without_its_samples(base: list[str], root: Path, two: str) -> None:
    """Otherwise its cosines would be drawn as falling to 0."""
    options = [*(each for each in base if not each.startswith("teacher.")), *QUIET, two, "teachers.draw=one"]
    options += ["teachers.vit.share=20", "teachers.clip.target_norm=standardize", "run.name=rare"]
    lines = [line for line in records(run_stage("mim", options)) if "loss" in line]
    told = [{name for name in line if name.startswith("clip/")} - {"clip/share"} for line in lines]
    assert [bool(names) for names in told] == [line["clip/share"] > 0 for line in lines]
    assert {line["clip/share"] > 0 for line in lines} == {True, False}
    assert all("vit/cosine" in line for line in lines)


@pytest.mark.parametrize(
    ("share", "message"), [("15", "the first batch has 16 features for its 16 channels"), ("1e9", "it has no sample")]
)
def test_phi_s_needs_samples_of_its_teacher_in_the_first_batch(
    alone: process_groups.Ranks, common: list[str], two: str, share: str, message: str
) -> None:
    """One of 16 has the CLIP, whose 16 channels need more than 16 features; or none has it."""
    with pytest.raises(ConfigError, match=f"phi_s of clip: {message}"):
        MaskedStage(load("mim", [*common, two, "teachers.draw=one", f"teachers.vit.share={share}"]), alone)
