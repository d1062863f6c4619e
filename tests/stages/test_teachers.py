"""Several teachers of the masked stage: losses, measures, heads, what is taken over and exported of each."""

from contextlib import closing
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from tests.stages.conftest import Material
from tests.stages.layout_steps import run_alone
from tests.stages.runs import result, run_stage
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.own.checkpoint_folders import latest
from w2s.checkpoint.starts.handover import load_all
from w2s.checkpoint.weights.released import open_released
from w2s.config.load import load
from w2s.config.sections import Config, ParallelConfig
from w2s.data.samples.batch import Batch
from w2s.data.stream.stream import Stream
from w2s.errors import ConfigError
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage
from w2s.teachers.text import text_weights
from w2s.towers.masked_student import outputs_of

STEPS = 3


def first_batch(config: Config, stage: MaskedStage) -> Batch:
    with closing(Stream(config.data, stage.spec, global_batch=16, seed=0, rank=0, size=1)) as stream:
        return stream.next()


def test_a_list_of_one_is_the_only_teacher_bit_for_bit(common: list[str], material: Material, vit: str) -> None:
    single = [
        "teacher.name=vit", f"teacher.source=timm:test_vit@{material.teacher}", "teacher.image_size=64",
        "teacher.target_norm=standardize",
    ]  # fmt: skip
    with process_groups.init_distributed(ParallelConfig(), load("mim", ["hardware=cpu"]).hardware) as ranks:
        one, listed = (load("mim", [*common, *chosen]) for chosen in (single, [f"teachers=[{vit}]"]))
        first, second = (run_alone(config, ranks, STEPS) for config in (one, listed))
        stages = [MaskedStage(config, ranks) for config in (one, listed)]
        names = [
            {*stage.extra_state(), *(n for n, _ in stage.student.chunks[0].named_parameters())} for stage in stages
        ]
    assert first.losses == second.losses
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], weight) for name, weight in second.weights.items())
    assert all(torch.equal(first.gradients[name], gradient) for name, gradient in second.gradients.items())
    assert names[0] == names[1] >= {"mean", "deviations", "count", "lm_head.weight", "head.weight"}


def test_the_loss_is_the_weighted_sum_and_each_teacher_is_reported(alone: Ranks, common: list[str], two: str) -> None:
    config = load("mim", [*common, two])
    stage = MaskedStage(config, alone)
    metrics = stage.step(first_batch(config, stage))
    summed = metrics["vit/loss"] + 0.5 * metrics["clip/loss"]
    assert metrics["loss"].item() == pytest.approx(summed.item(), rel=1e-6)  # the same sum in float32
    by_hand = -metrics["vit/cosine"] - 0.5 * metrics["vit/summary_cosine"]
    assert metrics["vit/loss"].item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert {"clip/cosine", "clip/constant_cosine", "clip/summary_cosine"} <= metrics.keys()


@pytest.fixture(scope="module")
def run(base: list[str], two: str) -> Path:
    """A finished run of two steps with both teachers."""
    options = [each for each in base if not each.startswith("teacher.")]
    changes = ["run.name=both", "tracking.enabled=false", "train.steps=2", "mim.summary_weight=1"]
    return run_stage("mim", [*options, two, *changes])


def test_each_teacher_has_its_measures_and_pictures(run: Path) -> None:
    metrics = result(run)["metrics"]
    for teacher in ("vit", "clip"):
        for images in ("test", "neighbours"):
            assert -1 < metrics[f"{teacher}/{images}/masked_cosine"] < 1
            assert 0 < metrics[f"{teacher}/{images}/constant_cosine"] < 1
            assert -1 < metrics[f"{teacher}/{images}/summary_cosine"] < 1
        assert 0 <= metrics[f"knn_teacher_{teacher}/top1"] <= 1
        assert (run / "pictures" / f"masked_{teacher}.png").is_file()
    assert 0 <= metrics["clip/zero_shot/top1"] <= 1
    assert "vit/zero_shot/top1" not in metrics, "a vision teacher shares no space with texts"
    assert "masked clip" in (run / "report.html").read_text()


def stage_config(run: Path) -> Config:
    return load("mim", [f"hardware={run / 'config.yaml'}"])


def head_of(run: Path, name: str) -> Tensor:
    return open_released(newest(run)).read(f"visual.{name}.weight")


def newest(run: Path) -> Path:
    checkpoint = latest(run)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(("teacher", "name"), [("", "head"), ("vit", "head"), ("clip", "teachers.clip.head")])
def test_the_contrastive_stage_takes_the_head_of_the_named_teacher(
    alone: Ranks, run: Path, common: list[str], teacher: str, name: str
) -> None:
    options = [each for each in common if not each.startswith(("mim.", "model.vision"))]
    config = load("clip", [*options, f"init.vision={run}", f"init.teacher={teacher}"])
    stage = ContrastiveStage(config, alone)
    handover = stage.begin()
    assert handover is not None
    assert torch.equal(stage.towers["vision"].chunks[0].head.weight, head_of(run, name))
    other = "vision.teachers.clip.head.weight" if name == "head" else "vision.head.weight"
    assert {other, "vision.lm_head.weight", "vision.teachers.clip.lm_head.weight"} <= {*handover.dropped}


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("", "timm:.* has no text tower"),
        ("vit", "timm:.* has no text tower"),
        ("clip", "the weights of .*=eva:.* are random"),
    ],
)
def test_the_text_tower_is_that_of_the_named_teacher(run: Path, common: list[str], teacher: str, reason: str) -> None:
    """Neither of the two has weights for one; why not tells whose was looked for."""
    options = [each for each in common if not each.startswith(("mim.", "model.vision"))]
    config = load("clip", [*options, f"init.vision={run}", "init.text=teacher", f"init.teacher={teacher}"])
    with pytest.raises(ConfigError, match=f"^init.text=teacher: .*{reason}"):
        text_weights(config)


def test_a_teacher_that_the_run_did_not_have_is_named(
    alone: Ranks, run: Path, common: list[str], tmp_path: Path
) -> None:
    options = [each for each in common if not each.startswith(("mim.", "model.vision"))]
    config = load("clip", [*options, f"init.vision={run}", "init.teacher=klip"])
    with pytest.raises(ConfigError, match=r"init.teacher=klip: the run had vit, clip: did you mean clip\?"):
        ContrastiveStage(config, alone).begin()
    with pytest.raises(ConfigError, match=r"--head=klip: the run had vit, clip"):
        export_checkpoint(newest(run), "timm", tmp_path / "out", head="klip")


@pytest.mark.parametrize(("teacher", "width"), [("vit", 64), ("clip", 16)])
def test_an_exported_student_stands_in_for_a_teacher(
    alone: Ranks, run: Path, teacher: str, width: int, tmp_path: Path
) -> None:
    """timm's tower ends where the student's prediction of that teacher's summary does."""
    export_checkpoint(newest(run), "timm", tmp_path / "out", head=teacher)
    tower = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student = MaskedStage(stage_config(run), alone)
    load_all(student.towers, newest(run))
    (part,) = student.student.chunks
    masks = torch.zeros(2, 16, dtype=torch.bool)
    with torch.no_grad():
        predictions = part(images, masks, torch.arange(16).expand(2, -1))
        found = tower(images)
    summary = outputs_of(predictions, student.distillation.targets)[["vit", "clip"].index(teacher)].summary
    assert found.shape == (2, width)
    torch.testing.assert_close(found, summary, rtol=1e-4, atol=1e-5)  # sums in float32, in another order


def test_the_first_batch_must_show_all_channels(alone: Ranks, common: list[str], two: str) -> None:
    with pytest.raises(ConfigError, match=r"phi_s of clip: the first batch has 16 features .* train.global_batch=2 or"):
        MaskedStage(load("mim", [*common, two, "train.global_batch=1", "train.micro_batch=1"]), alone)
