"""What a run is made of beside its steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.planning.test_plan import eva_18b, one
from w2s.config.sections import CheckpointConfig, Config
from w2s.errors import UserError
from w2s.planning.model.towers import planned_towers
from w2s.planning.plan import Plan
from w2s.planning.run_time import Images, counted, run_time
from w2s.planning.time.cards import card
from w2s.planning.time.layer_costs import layer_time

H100 = card("h100")
NOTHING = Images(0)


def saving(plan: Plan, **settings: object) -> Plan:
    return replace(plan, config=replace(plan.config, checkpoint=CheckpointConfig(every=1000, **settings)))


def test_a_checkpoint_holds_training_up_while_it_is_copied_or_written() -> None:
    """14 bytes a parameter of a rank's share: 2 of its weight, 12 of master weight and moments."""
    plan = one()
    assert plan.written == pytest.approx(14 / 12 * plan.memory.optimizer, rel=1e-3)
    behind, waiting, kept = (
        run_time(saving(plan, **how), H100, NOTHING).checkpoints
        for how in ({"async_save": True}, {}, {"async_save": True, "memory": True})
    )
    assert behind.seconds == pytest.approx(plan.written / (0.7 * 64e9))
    assert waiting.seconds - behind.seconds == pytest.approx(8 * plan.written / 2e9 + plan.written / 1.1e9)
    assert kept.seconds - behind.seconds == pytest.approx(plan.host.seconds)


def test_checkpoints_are_counted_as_they_are_made() -> None:
    """1,464,844 steps: one every 1,000, the last, and those that are asked for."""
    plan = one()
    assert run_time(saving(plan), H100, NOTHING).checkpoints.times == 1464 + 1
    assert run_time(saving(plan, keep_at=[1500, 2000, 9_999_999]), H100, NOTHING).checkpoints.times == 1464 + 1 + 1


def layer_seconds(config: Config, images: int) -> float:
    """A layer's forward pass with all patches."""
    whole = replace(config, clip=replace(config.clip, patch_dropout=0.0))
    tower = planned_towers(whole)[0]
    return layer_time(H100, tower, config.parallel, images, fp8=0.0, fused=False).forward.total


def test_an_evaluation_goes_through_the_pipeline_in_batches_that_ranks_share() -> None:
    """4 stages of 12 layers, 16 replicas: 17 batches of 256 are two rounds of four micro-batches each."""
    plan = one("clip", gpus=64, tensor=1, sequence=False, overrides=("train.eval_every=1000",))
    found = run_time(plan, H100, Images(16 * 256 + 1)).evaluations
    assert found is not None
    assert found.times == 1 + 55 + 1, "at the beginning, within 55,278 steps, at the end"
    a_layer = layer_seconds(plan.config, 64)
    assert found.seconds == pytest.approx(2 * (4 + 3) * 12 * a_layer, rel=0.02)  # stages are balanced by the head too
    fewer = run_time(plan, H100, Images(16 * 256)).evaluations
    assert fewer is not None and fewer.seconds == pytest.approx(found.seconds / 2)


def test_a_masked_student_is_measured_beside_its_teacher() -> None:
    plan = one(gpus=256, tensor=1, sequence=False, pipeline=8, micro_batch=4)
    test, both = (run_time(plan, H100, images).evaluations for images in (Images(256), Images(256, neighbours=256)))
    (teacher,) = plan.teachers
    assert test is not None and both is not None
    # On each of the eight ranks of a replica the teacher embeds 32 of the 256 images.
    with_teacher = 32 * teacher.flops / (794e12 * 0.75)
    # k-NN takes features of the test images once more, and of the neighbours.
    assert both.seconds - with_teacher == pytest.approx(3 * (test.seconds - with_teacher))


def test_the_parts_are_the_run() -> None:
    plan = one()
    run = run_time(plan, H100, Images(1000))
    assert run.steps.days == pytest.approx(plan.days)
    assert run.evaluations is not None
    assert run.days == pytest.approx(run.steps.days + run.checkpoints.days + run.evaluations.days)
    unknown = run_time(plan, H100, None)
    assert unknown.evaluations is None and unknown.days < run.days


def test_images_are_counted_where_that_is_possible(tmp_path: Path) -> None:
    for folder, size in (("test", 100), ("train", 40)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").touch()
        (tmp_path / folder / "sizes.json").write_text(json.dumps({"0.tar": size}))
    shards = [f"eval.shards={tmp_path}/test", f"run.root={tmp_path}"]
    assert counted(eva_18b("mim", *shards), 0) == Images(100)
    assert counted(eva_18b("mim", *shards, f"eval.knn_shards={tmp_path}/train"), 0) == Images(100, 40)
    assert counted(eva_18b("mim", *shards), 50_000) == Images(50_000)
    assert counted(eva_18b("mim", *shards, f"eval.knn_shards={tmp_path}/train"), 50_000) == Images(50_000, 40)
    assert counted(eva_18b("mim", "eval.shards=/nowhere/test"), 0) is None
    assert counted(eva_18b("mim"), 0) == NOTHING
    with pytest.raises(UserError, match=r"--eval-images 10 without test shards: give eval.shards, or leave it out"):
        counted(eva_18b("mim"), 10)
