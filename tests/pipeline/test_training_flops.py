import pytest

from w2s.config.load import load
from w2s.config.teacher_losses import Target
from w2s.pipeline.training_flops import steps_of_equal_compute, training_flops
from w2s.planning.model.flops import stage_flops
from w2s.planning.model.teacher import planned_teachers

MIM = ["model=tiny", "teacher.source=timm:test_vit", "teacher.image_size=64", "train.steps=30"]


def test_a_masked_stage_pays_for_its_teacher() -> None:
    """By hand for timm's test_vit: 6 layers of width 64, at 64 px 16 patches and CLS."""
    config = load("mim", MIM)
    student = stage_flops(config, 1, targets=[Target(64)]).model
    layer = 2 * 17 * (4 * 64**2 + 2 * 64 * 192) + 4 * 17**2 * 64
    patches = 2 * 16 * 3 * 16**2 * 64
    assert training_flops(config) == pytest.approx((student + 6 * layer + patches) * 30 * 64, rel=1e-12)


def test_a_contrastive_stage_pays_for_its_teacher_while_it_takes_part() -> None:
    """Forward passes of both towers of `eva_s` for an image and a caption, and the teacher's logits."""
    keys = ["model=tiny", "clip.distill.source=eva:eva_s@none", "train.steps=40", "train.global_batch=64"]
    (teacher,) = planned_teachers(load("clip", keys))
    alone = training_flops(load("clip", [keys[0], *keys[2:]]))
    more = {until: training_flops(load("clip", [*keys, f"clip.distill.until={until}"])) - alone for until in (1, 0.25)}
    assert more[1] == pytest.approx(40 * 64 * (teacher.flops + 2 * 64 * teacher.width), rel=1e-9)
    assert more[0.25] == pytest.approx(more[1] / 4, rel=1e-9)
    config = load("clip", [*keys, "clip.distill.until=0.25"])
    assert training_flops(config, begins_at=5) == pytest.approx(alone * 35 / 40 + more[1] * 5 / 40, rel=1e-9)
    assert steps_of_equal_compute(config, 3 * training_flops(config)) == 120


def test_equal_compute_is_equal_to_half_a_step() -> None:
    config, other = load("clip", ["model=tiny"]), load("mim", MIM)
    steps = steps_of_equal_compute(config, 2 * training_flops(other))
    one = training_flops(config) / config.train.steps
    assert abs(steps * one - 2 * training_flops(other)) <= one / 2


def test_a_summary_target_costs_its_two_linears() -> None:
    """The teacher's summary has 64 channels, the tiny model's shared space another width."""
    config, more = load("mim", MIM), load("mim", [*MIM, "mim.summary_weight=0.5"])
    width, embed_dim = config.model.vision.width, config.model.embed_dim
    assert embed_dim != 64
    linears = 3 * 2 * (width * embed_dim + embed_dim * 64)
    assert training_flops(more) - training_flops(config) == pytest.approx(linears * 30 * 64, rel=1e-9)
