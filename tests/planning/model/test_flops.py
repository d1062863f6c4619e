"""FLOPs by formula against torch's counter on whole steps, and against the released models' figures."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from tests.planning.memory.measured import SMALL
from tests.stages.shape_images import write_shapes
from w2s.config.batching import num_micro_batches, num_passes
from w2s.config.load import load, named_model
from w2s.config.sections import Config, HardwareConfig, ParallelConfig
from w2s.config.teacher_losses import Target
from w2s.data.stream.stream import Stream
from w2s.megatron.parallel import process_groups
from w2s.planning.model.flops import (
    image_flops,
    loss_flops,
    recomputed_fraction,
    stage_flops,
    student_flops,
    teacher_flops,
    text_flops,
)
from w2s.planning.model.teacher import planned_teachers, predicted
from w2s.planning.model.towers import planned_towers
from w2s.stages.clip import ContrastiveStage
from w2s.stages.mim import MaskedStage
from w2s.towers.masked_student import MaskedStudent

BATCH = 12
CONFIG = [*SMALL, f"train.global_batch={BATCH}"]


def flash(query: list[int], key: list[int], value: list[int], *rest: object, **options: object) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def flash_back(grad: list[int], query: list[int], key: list[int], value: list[int], *r: object, **o: object) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


def product_added(into: list[int], left: list[int], right: list[int], *rest: object, **options: object) -> int:
    return flop_counter.mm_flop(left, right)


# The counter knows neither a CPU's flash attention nor products in place: it is given its own formulas for them.
ON_CPU = {
    torch.ops.aten.addmm_: product_added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_back,
}


class NoModules(nullcontext[None]):
    """In place of the counter's table by module, whose hooks fail on Megatron's passes without gradients."""

    parents = frozenset({"Global"})


def operations(run: Callable[[], Any]) -> int:
    """What torch's counter counts."""
    counter = FlopCounterMode(display=False, custom_mapping=ON_CPU)
    counter.mod_tracker = NoModules()
    with counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_shapes(tmp_path_factory.mktemp("data") / "shards", 1, seed=0))


def counted(config: Config) -> tuple[float, MaskedStage | ContrastiveStage]:
    """Operations of a step for one sample by torch's counter, on one rank."""
    with process_groups.init_distributed(config.parallel, config.hardware) as ranks:
        stage = (MaskedStage if config.stage == "mim" else ContrastiveStage)(config, ranks)
        stream = Stream(config.data, stage.spec, global_batch=BATCH, seed=0, rank=0, size=1)
        batch = stream.next()
        return operations(lambda: stage.step(batch)) / BATCH, stage


@pytest.mark.parametrize(
    ("stage", "micro", "recompute"),
    [
        ("mim", 4, ["full"]),
        ("mim", 12, ["selective"]),
        ("mim", 12, ["full", "parallel.recompute_layers=1"]),
        ("clip", 4, ["none"]),
        ("clip", 4, ["full", "parallel.recompute_layers=1"]),
        ("clip", 12, ["none"]),
        ("clip", 12, ["selective"]),
        ("clip", 12, ["full"]),
    ],
    ids=str,
)
def test_the_formulas_give_what_the_counter_counts(shards: str, stage: str, micro: int, recompute: list[str]) -> None:
    """Two towers of three layers; in the contrastive stage a micro-batch of 4 makes two passes, one of 12 one."""
    layers = ["model.vision.layers=3", "model.text.layers=3"]
    cut = [f"train.micro_batch={micro}", f"parallel.recompute={recompute[0]}", *recompute[1:]]
    teacher = ["teacher.source=efficientnet_lite0"]
    config = load(stage, [*CONFIG, *layers, *cut, *teacher, f"data.train={shards}"])
    total, built = counted(config)
    targets, by_teacher = [], 0.0
    if isinstance(built, MaskedStage):
        (masked_teacher,) = built.distillation.teachers
        one = torch.zeros(1, 3, masked_teacher.teacher.image_size, masked_teacher.teacher.image_size)
        targets, by_teacher = built.distillation.targets, operations(partial(masked_teacher.teacher, one))
    expected = stage_flops(config, 1, targets=targets, teacher=by_teacher)
    assert num_passes(config, num_micro_batches(config, 1)) == (2 if stage == "clip" and micro == 4 else 1)
    # Exact but for a sum of squares in the loss, which the counter takes for a product: 2 x 16 operations of 2 million.
    assert total - by_teacher == pytest.approx(expected.hardware - by_teacher, rel=2e-5)


LAYERS = "layers=[{student: 0, teacher: 3}, {student: 1, teacher: 5}]"


@pytest.mark.parametrize(
    "mim",
    [
        ["masked_patches=0"],
        ["predict=visible"],
        ["predict=all", "loss=mse"],
        ["predict=visible", LAYERS],
        ["summary_weight=1", "summary=pooled"],
    ],
    ids=str,
)
def test_what_is_neither_seen_nor_predicted_costs_nothing(shards: str, mim: list[str]) -> None:
    source = "timm:test_vit" if LAYERS in mim else "efficientnet_lite0"
    options = [f"teacher.source={source}", "train.micro_batch=12", *(f"mim.{option}" for option in mim)]
    config = load("mim", [*CONFIG, *options, f"data.train={shards}"])
    total, built = counted(config)
    assert isinstance(built, MaskedStage)
    teacher = built.distillation.teachers[0].teacher
    one = torch.zeros(1, 3, teacher.image_size, teacher.image_size)
    by_teacher = operations(partial(teacher, one))
    expected = stage_flops(config, 1, targets=built.distillation.targets, layer_width=teacher.layer_width)
    assert total - by_teacher == pytest.approx(expected.hardware, rel=2e-5)  # as above


def test_several_teachers_and_their_heads_are_counted(shards: str) -> None:
    """Operations and parameters of the student, and operations of each teacher."""
    both = "teachers=[{name: vit, source: 'timm:test_vit', image_size: 64}, {name: clip, source: 'eva:tiny'}]"
    plain = [each for each in CONFIG if not each.startswith("teacher.")]
    config = load("mim", [*plain, both, "mim.summary_weight=1", "train.micro_batch=12", f"data.train={shards}"])
    total, built = counted(config)
    assert isinstance(built, MaskedStage)
    teachers = planned_teachers(config)
    for planned, masked_teacher in zip(teachers, built.distillation.teachers, strict=True):
        one = torch.zeros(1, 3, masked_teacher.teacher.image_size, masked_teacher.teacher.image_size)
        assert planned.flops == operations(partial(masked_teacher.teacher, one))
    predictions = predicted(config, teachers)
    assert predictions["targets"] == built.distillation.targets
    by_teacher = sum(teacher.flops for teacher in teachers)
    assert total == pytest.approx(
        stage_flops(config, 1, **predictions, teacher=by_teacher).hardware, rel=4e-5
    )  # two such sums
    (tower,), (student,) = planned_towers(config, **predictions), built.student.chunks
    assert sorted(tower.chunk(0, 1, True)) == sorted(parameter.numel() for parameter in student.parameters())


@pytest.mark.parametrize(("kind", "frames"), [("feature", 1), ("affinity", 3)])
def test_a_teacher_beside_the_contrastive_loss(shards: str, kind: str, frames: int) -> None:
    """Its towers, and the products of the loss of distillation; of clips all frames."""
    distill = ["clip.distill.source=eva:tiny", f"clip.distill.kind={kind}", f"data.frames={frames}"]
    config = load("clip", [*CONFIG, *distill, "train.micro_batch=12", f"data.train={shards}"])
    total, built = counted(config)
    (teacher,) = planned_teachers(config)
    pixels, captions = torch.zeros(frames, 3, 32, 32, dtype=torch.uint8), torch.ones(1, 16, dtype=torch.int64)
    assert teacher.flops == operations(partial(built.teachers[0], pixels[None] if frames > 1 else pixels, captions))
    expected = stage_flops(config, 1, targets=[Target(teacher.width)], teacher=teacher.flops)
    assert total == pytest.approx(expected.hardware, rel=4e-5)  # two such sums


def test_a_teacher_of_evas_kind() -> None:
    """What torch's counter gives for the released tower with its head on every patch (tools/teacher_table.py)."""
    for name, gflop in {"eva02_e_plus": 2265.3, "eva_18b": 9125.2, "eva01_g": 534.8}.items():
        model = named_model(name)
        assert teacher_flops(model.vision, model.embed_dim) / 1e9 == pytest.approx(gflop, abs=0.051)


def test_eva_18b_costs_what_was_worked_out_by_hand() -> None:
    """The table of TFLOP per image, and those of training per sample, in four digits."""
    teacher = named_model("eva02_e_plus")
    by_teacher = teacher_flops(teacher.vision, teacher.embed_dim)
    mim = load("mim", ["model=eva_18b", "teacher=eva02_clip_e_plus"])
    clip = load("clip", ["model=eva_18b"])
    whole = load("clip", ["model=eva_18b", "clip.patch_dropout=0"])
    assert image_flops(whole).forward / 1e12 == pytest.approx(9.121, abs=5e-4)
    # The table's 4.563 embeds the dropped patches too.
    assert image_flops(clip).forward / 1e12 == pytest.approx(4.562, abs=5e-4)
    assert text_flops(clip.model.text, clip.model.embed_dim).forward / 1e12 == pytest.approx(0.098, abs=5e-4)
    # The table's teacher puts CLS alone through its head, ours every patch: 0.001 more.
    assert by_teacher / 1e12 == pytest.approx(2.264 + 0.001, abs=5e-4)
    assert student_flops(mim, [Target(teacher.embed_dim)]).head / 1e12 == pytest.approx(0.001, abs=5e-4)
    masked = stage_flops(mim, 256, targets=[Target(teacher.embed_dim)], teacher=by_teacher)
    assert masked.model / 1e12 == pytest.approx(29.63, abs=5e-3)
    half = load("mim", ["model=eva_18b", "teacher=eva02_clip_e_plus", "mim.predict=visible", "mim.masked_patches=128"])
    halved = stage_flops(half, 256, targets=[Target(teacher.embed_dim)], teacher=by_teacher)
    assert halved.model / 1e12 == pytest.approx(15.95, abs=5e-3)
    assert halved.model / masked.model == pytest.approx(0.54, abs=5e-3)
    assert stage_flops(clip, 256).model / 1e12 == pytest.approx(13.98, abs=5e-3)
    assert stage_flops(whole, 256).model / 1e12 == pytest.approx(27.66, abs=5e-3)
    # Logits at 108k: twice 0.00033 in a loss that computes those of either direction, once here.
    assert loss_flops(clip).model / 3e12 == pytest.approx(0.0007 / 2, abs=5e-5)


def trained(student: MaskedStudent, *inputs: torch.Tensor) -> None:
    student.predict(*inputs).float().sum().backward()


def test_half_of_eva_18bs_tokens_by_the_counter() -> None:
    """Its student forward and backward, without its weights; the teacher sees whole images in both."""
    model, teacher = named_model("eva_18b").vision, named_model("eva02_e_plus")
    by_teacher = teacher_flops(teacher.vision, teacher.embed_dim)
    totals = []
    for options in ([], ["mim.predict=visible", "mim.masked_patches=128"]):
        config = load("mim", ["model=eva_18b", "teacher=eva02_clip_e_plus", *options])
        with process_groups.init_distributed(ParallelConfig(), HardwareConfig(device="cpu")), torch.device("meta"):
            student = MaskedStudent(
                model, [Target(teacher.embed_dim)], ParallelConfig(), torch.bfloat16, drop_masked=bool(options)
            )
            images, masks = torch.empty(1, 3, 224, 224), torch.empty(1, model.patches, dtype=torch.bool)
            places = torch.empty(1, config.mim.predicted(model.patches), dtype=torch.int64)
            counted = operations(partial(trained, student, images, masks, places))
        totals.append(counted + by_teacher)
        planned = stage_flops(config, 1, targets=[Target(teacher.embed_dim)], teacher=by_teacher)
        assert totals[-1] == pytest.approx(planned.model, rel=1e-9)
    assert totals[1] / totals[0] == pytest.approx(0.54, abs=5e-3)


def test_full_recompute_and_two_passes_cost_a_third_each() -> None:
    teacher = named_model("eva02_e_plus")
    by_teacher = teacher_flops(teacher.vision, teacher.embed_dim)

    def ratio(stage: str, *overrides: str) -> float:
        config = load(stage, ["model=eva_18b", "teacher=eva02_clip_e_plus", *overrides])
        flops = stage_flops(
            config, 256, targets=[Target(teacher.embed_dim)], teacher=by_teacher if stage == "mim" else 0
        )
        return flops.hardware / flops.model

    one_pass = ["train.micro_batch=424"]
    assert ratio("mim", "parallel.recompute=full") == pytest.approx(1.31, abs=5e-3)
    assert ratio("clip", *one_pass, "parallel.recompute=full") == pytest.approx(1.33, abs=5e-3)
    assert ratio("clip") == pytest.approx(1.33, abs=5e-3)
    assert ratio("clip", "parallel.recompute=full") == pytest.approx(5 / 3, abs=5e-3)


def test_recomputed_layers_are_counted_in_each_chunk() -> None:
    full = replace(load("mim").parallel, recompute="full")
    assert recomputed_fraction(full, [3, 5]) == 1
    assert recomputed_fraction(replace(full, recompute_layers=4), [3, 5]) == 7 / 8
    assert recomputed_fraction(replace(full, recompute="selective"), [3, 5]) == 0
