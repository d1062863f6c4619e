"""Bytes and operations of teachers against the networks themselves."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from w2s.config.load import load
from w2s.config.sections import ParallelConfig, TeacherConfig
from w2s.pipeline.training_flops import training_flops
from w2s.planning.model.flops import stage_flops
from w2s.planning.model.teacher import images_of_rank, planned_teachers, predicted, sample_flops
from w2s.teachers.base import Teacher
from w2s.teachers.build import without_weights
from w2s.teachers.text import build_text_teacher


@pytest.mark.parametrize("name", ["eva02_e_plus", "eva_18b", "eva_s", "vit_h_14", "vit_so400m_14_siglip"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_eva_teacher_is_worked_out_as_its_network_is(name: str, precision: str) -> None:
    config = load("mim", [f"teacher.source=eva:{name}@none", f"teacher.precision={precision}"])
    (planned,) = planned_teachers(config)
    network = without_weights(config.teacher, grid=16)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, network.image_size, network.image_size, device="meta"))
    teacher = Teacher(network, grid=16, precision=config.teacher.precision)
    tensors = [*teacher.parameters(), *teacher.buffers()]
    assert planned.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert planned.flops == counter.get_total_flops()
    assert (planned.width, planned.image_size) == (network.width, network.image_size)


def test_an_eva_teacher_sees_images_of_the_size_that_is_given() -> None:
    config = load("mim", ["teacher.source=eva:eva_s@none", "teacher.image_size=448"])
    (planned,), network = planned_teachers(config), without_weights(config.teacher, grid=32)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 448, 448, device="meta"))
    assert planned.image_size == network.image_size == 448
    assert planned.flops == counter.get_total_flops()


@pytest.mark.parametrize(("source", "width"), [("eva:tiny@none", 16), ("open_clip:ViT-S-32", 384)])
def test_a_text_tower_is_worked_out_as_its_network_is(source: str, width: int) -> None:
    """As it reads the student's captions, of 16 tokens."""
    keys = ["clip.distill.kind=feature", "clip.distill.towers=text", f"model.embed_dim={width}"]
    config = load("clip", ["model=tiny", f"clip.distill.source={source}", *keys])
    (planned,) = planned_teachers(config)
    teacher = build_text_teacher(TeacherConfig(source=source.partition("@")[0]), context_length=16, device="cpu")
    # The counter knows no fused attention on a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        teacher(torch.ones(1, 16, dtype=torch.int64))
    tensors = [*teacher.parameters(), *teacher.buffers()]
    assert planned.text_weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert planned.flops == counter.get_total_flops()
    assert (planned.width, planned.image_size, planned.weights) == (teacher.width, 0, 0)


def test_a_clip_as_teacher_costs_what_its_towers_cost() -> None:
    """Both for affinities, and for a comparison; else those that are asked for."""

    def flops(*keys: str) -> float:
        return planned_teachers(load("clip", [*student, *keys]))[0].flops

    student = ["model=tiny", "model.embed_dim=512", "clip.distill.source=eva:eva_s@none"]
    feature = "clip.distill.kind=feature"
    image, text = (flops(feature, f"clip.distill.towers={name}") for name in ("image", "text"))
    assert image == planned_teachers(load("mim", ["teacher.source=eva:eva_s@none"]))[0].flops
    assert flops() == flops(feature) == image + text
    assert flops(feature, "clip.distill.towers=text", "clip.distill.until_better=true") == image + text
    assert planned_teachers(load("clip", ["model=tiny"])) == ()


def test_any_other_network_is_counted() -> None:
    """EfficientNet-Lite0 for 16 x 16 patches: 4.0 GFLOP an image, 5 million parameters in float32."""
    (planned,) = planned_teachers(load("mim", ["teacher=efficientnet_lite0", "model.vision.image_size=256"]))
    assert planned.flops / 1e9 == pytest.approx(4.0, abs=0.051)
    assert planned.width == 1280
    assert planned.weights / 4 == pytest.approx(5e6, abs=0.5e6)


TAUGHT = [
    "model=eva_s", "data.builtin=none", "data.train=a/one/*.tar::a/two/*.tar", "data.weights=[0.75,0.25]",
    "train.global_batch=512", "train.micro_batch=16",
    "teachers=[{name: big, source: 'eva:eva02_e_plus', share: 3}, {name: small, source: 'eva:eva_s'}]",
]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        (["teachers.big.share=1"], [1.0, 1.0]),
        (["teachers.draw=one"], [0.75, 0.25]),
        (["teachers.big.share=1", "teachers.small.sources=[two]"], [1.0, 0.25]),
        (["teachers.draw=one", "teachers.small.sources=[two]"], [0.9375, 0.0625]),
    ],
)
def test_teachers_cost_what_their_shares_of_the_samples_do(keys: list[str], shares: list[float]) -> None:
    """A sample's FLOPs and all training's are sums by share, and so is the slowest rank's time, to an image."""
    config = load("mim", [*TAUGHT, *keys, "train.steps=7", "parallel.tensor=4", "parallel.pipeline=2"])
    teachers = planned_teachers(config)
    assert [each.share for each in teachers] == shares
    whole = sum(share * each.flops for share, each in zip(shares, teachers, strict=True))
    assert sample_flops(teachers) == pytest.approx(whole)
    alone = replace(config, parallel=ParallelConfig())
    student = stage_flops(alone, 1, **predicted(config, teachers)).model
    assert training_flops(config) == pytest.approx(7 * 512 * (student + whole))
    images = images_of_rank(config, teachers, 16)
    slowest = sum(count * each.flops for count, each in zip(images, teachers, strict=True))
    assert 32 * whole <= 1.0001 * slowest
    assert slowest <= 32 * whole + max(each.flops for each in teachers)
    assert images_of_rank(alone, teachers, 16) == pytest.approx([32 * share for share in shares])
