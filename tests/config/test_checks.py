import pytest
import torch

from tests.config.refusals import accepts, refusal
from w2s.config.batching import sequence_lengths
from w2s.config.checks import doubts
from w2s.config.fields import FIELDS
from w2s.config.load import STAGES, load
from w2s.config.rules import OnlyFor, Section, UselessWith


def test_rules_name_keys_and_stages_that_there_are() -> None:
    rules = [rule for section in Section.__subclasses__() for rules in section.rules.values() for rule in rules]
    assert {rule.key for rule in rules if isinstance(rule, UselessWith)} < FIELDS.keys()
    assert {stage for rule in rules if isinstance(rule, OnlyFor) for stage in rule.stages} <= {*STAGES}


def test_clips_are_for_the_contrastive_stage_and_count_as_their_frames() -> None:
    assert refusal("mim", "data.frames=8") == (
        "data.frames=8 is not for stage mim: the masked stage learns from the middle frame of a clip, give it to clip "
        "or eval alone"
    )
    assert refusal("mim", "data.phases=[{frames: 2}]") == (
        "data.phases: frames is for the contrastive stage, not for mim: remove it"
    )
    phases = "data.phases=[{samples: 6400}, {frames: 8, patch_dropout: 0}]"
    config = load("clip", ["model=tiny", "data.frames=2", "clip.patch_dropout=0.5", phases])
    # 16 patches, with the class token: 2 frames of half of them, 8 of all; and the captions.
    assert sequence_lengths(config) == [2 * 9, 8 * 17, 16]
    assert accepts("clip", "data.frames=8")


def test_what_is_frozen_for_no_steps_or_is_not_there() -> None:
    assert accepts("clip", "optim.text_frozen_steps=5", "optim.text_frozen_layers=4")
    assert refusal("clip", "optim.vision_frozen_layers=1") == (
        "optim.vision_frozen_layers=1 does nothing with optim.vision_frozen_steps=0: leave it out, or set "
        "optim.vision_frozen_steps"
    )
    assert "must lie between 0 (the embeddings) and model.text.layers=4: leave it out" in refusal(
        "clip", "optim.text_frozen_steps=5", "optim.text_frozen_layers=5"
    )
    assert "has no text tower" in refusal("mim", "optim.text_frozen_steps=5")


def test_only_a_finished_tower_grows() -> None:
    assert accepts("mim", "init.vision=run", "init.grow=stack")
    assert refusal("clip", "init.vision=none", "init.grow=stack") == (
        "init.grow=stack needs a finished tower: name one with init.vision or init.text, or leave it out"
    )
    assert "init.grow_width=copy needs a finished" in refusal("clip", "init.checkpoint=run", "init.grow_width=copy")


def test_a_cool_down_belongs_to_a_constant_rate() -> None:
    assert refusal("mim", "optim.cooldown=0.1") == (
        "optim.cooldown=0.1 does nothing with optim.schedule=cosine: leave it out, or use optim.schedule=constant"
    )
    constant = ["optim.schedule=constant", "train.steps=100"]
    assert accepts("mim", *constant, "optim.cooldown=0.9", "optim.warmup=10")
    assert "begins before the end of optim.warmup=11" in refusal(
        "mim", *constant, "optim.cooldown=0.9", "optim.warmup=11"
    )


def test_a_checkpoint_to_continue_from_brings_all_weights() -> None:
    assert accepts("clip", "init.checkpoint=trunk")
    assert refusal("clip", "init.checkpoint=trunk", "init.vision=other") == (
        "init.vision=other does nothing with init.checkpoint=trunk, which brings all weights: leave one of them out"
    )
    assert refusal("clip", "init.checkpoint=trunk", "clip.logit_scale=100").startswith(
        "clip.logit_scale=100.0 does nothing with init.checkpoint=trunk"
    )


def test_weights_of_layers_without_layers() -> None:
    assert refusal("mim", "mim.layers_weight=1") == (
        "mim.layers_weight=1 does nothing with mim.layers=[]: leave it out, or set mim.layers"
    )


@pytest.mark.parametrize("stage", ["mim", "clip", "eval"])
def test_the_defaults_pass(stage: str) -> None:
    assert accepts(stage)


def test_a_batch_that_does_not_divide_names_one_that_does() -> None:
    assert refusal("mim", "train.micro_batch=48") == (
        "train.micro_batch=48 does not divide the 64 samples of a rank (train.global_batch=64 on 1 data-parallel rank)"
        ": use train.micro_batch=32, another divisor of 64, or anything above"
    )
    assert "use train.micro_batch=16, " in refusal("mim", "train.micro_batch=31", ranks=2)
    assert refusal("mim", ranks=3).endswith("use train.global_batch=63 or 66")
    assert refusal("mim", "train.global_batch=2", ranks=3).endswith("use train.global_batch=3")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_share_below_the_micro_batch_is_one_micro_batch(world_size: int) -> None:
    assert accepts("mim", "hardware=cpu", "train.global_batch=64", "train.micro_batch=65", ranks=world_size)


def test_the_named_batch_passes() -> None:
    assert accepts("mim", "train.micro_batch=32")
    assert accepts("mim", "train.micro_batch=16", ranks=2)
    assert accepts("mim", "train.global_batch=66", "train.micro_batch=11", "data.lanes=66", ranks=3)
    assert refusal("mim", "train.global_batch=66", "train.micro_batch=11", ranks=3) == (
        "data.lanes=8 is not divisible by 3 ranks, each of which reads: use data.lanes=3, 6, 33 or 66"
    )
    assert refusal("mim", "parallel.tensor=2", "data.lanes=2", ranks=4) == (
        "data.lanes=2 is not divisible by 4 ranks (2 data x 2 tensor), each of which reads: "
        "use data.lanes=8, 16, 32 or 64"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mim.masked_patches=16", "mim.masked_patches=16 must lie between 0 and 15: an image has 16 patches"),
        ("mim.masked_patches=-1", "mim.masked_patches=-1 must lie between 0 and 15"),
        ("mim.min_block=7", "mim.min_block=7 is more than mim.masked_patches=6: use mim.min_block=1"),
        ("mim.layers=[{student: 6, teacher: 0}]", "mim.layers: the student has no layer 6, its layers are 0 to 5"),
        ("mim.layers=[{student: 1, teacher: 0}, {student: 1, teacher: 2}]", "mim.layers: student=1 is given twice"),
        ("mim.layers_weight=0", "mim.layers_weight=0 must be above 0"),
        ("mim.layers_until=2", "mim.layers_until=2 must be in (0, 1]"),
        ("mim.block_aspect=0", "mim.block_aspect=0 must be in (0, 1]"),
        ("clip.patch_dropout=1", "clip.patch_dropout=1 must be in [0, 1)"),
        ("clip.patch_dropout=-0.1", "clip.patch_dropout=-0.1 must be in [0, 1)"),
        ("optim.lr=0", "optim.lr=0 must be above 0"),
        ("optim.text_lr=-1", "optim.text_lr=-1 must be above 0"),
        ("optim.warmup=600", "optim.warmup=600 must be less than train.steps=240: use optim.warmup=24"),
        ("optim.lr=.inf", "optim.lr=inf must be above 0 and finite"),
        ("optim.betas=[0.9,1.0]", "optim.betas=[0.9, 1] must each be in [0, 1)"),
        ("checkpoint.keep_at=[3, 0]", "checkpoint.keep_at=[3, 0] must each be at least 1"),
        ("optim.trust_ratio=[0.01,10]", "optim.trust_ratio=[0.01, 10] does nothing with optim.name=adamw"),
        ("optim.trust_1d=never", "optim.trust_1d=never does nothing with optim.name=adamw"),
        ("data.train=", "data.train is empty"),
    ],
)
def test_a_value_out_of_range(override: str, message: str) -> None:
    assert refusal("mim", override).startswith(message)


def test_bounds_of_the_trust_ratio() -> None:
    for bounds in ("[0,10]", "[2,1]", "[0.1,nan]"):
        assert "must be two rising numbers above 0" in refusal("clip", "optim.name=lamb", f"optim.trust_ratio={bounds}")
    assert accepts("clip", "optim.name=lamb", "optim.trust_ratio=[0.01,10]")


def test_a_logit_scale_above_its_maximum() -> None:
    assert refusal("clip", "clip.logit_scale=200").startswith("clip.logit_scale=200 is above clip.logit_scale_max=100")


def test_evaluation_needs_shards_and_a_model() -> None:
    assert refusal("eval", "eval.shards=").startswith("eval.shards is empty")
    assert refusal("eval", "init.checkpoint=none").startswith("init.checkpoint=none leaves nothing to evaluate")


def test_named_test_sets_take_the_place_of_the_single_one() -> None:
    sets = "eval.sets={a: /a, b: '/b/{0..1}.tar'}"
    assert accepts("eval", "eval.shards=", sets)
    assert refusal("eval", "eval.shards=/c", sets) == (
        "eval.shards=/c and eval.sets are both given: name it in eval.sets, or empty one of them"
    )
    assert refusal("clip", sets) == (
        "eval.sets={'a': '/a', 'b': '/b/{0..1}.tar'} is not for stage clip: training is measured on eval.shards alone, "
        "give it to eval alone"
    )


def test_only_a_finished_clip_is_registered() -> None:
    clip = ("model=tiny", "init.vision=none", "tracking.register=mine")
    assert accepts("clip", *clip)
    assert refusal("mim", "tracking.register=mine") == (
        "tracking.register=mine is not for stage mim: the masked stage makes no CLIP, give it to clip or eval alone"
    )
    assert "does nothing with tracking.enabled=false: leave it out, or use tracking.enabled=true" in refusal(
        "clip", *clip, "tracking.enabled=false"
    )
    for name in ("a/b", "a:b"):
        assert "has no / and no :" in refusal("clip", *clip[:2], f"tracking.register={name}")


def test_a_gpu_configuration_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refusal("mim", "hardware=h100") == (
        "this machine has no GPU that torch can use, but hardware.device=cuda: use hardware=cpu"
    )


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refusal("mim", ranks=4) == "4 ranks on a machine with 2 GPUs: use --nproc 2, or hardware=cpu"
    assert accepts("mim", "hardware=cpu", "train.micro_batch=16", ranks=4)


def test_phases_fill_the_run_or_last_to_its_end() -> None:
    steps = ("train.steps=20", "train.global_batch=64")
    assert refusal("clip", *steps, "data.phases=[{samples: 640}, {samples: 320}]").startswith(
        "data.phases have 960 samples, but train.steps=20 x train.global_batch=64 are 1280: use train.steps=15, or "
    )
    assert accepts("clip", *steps, "data.phases=[{samples: 640}, {samples: 640}]")
    assert accepts("clip", *steps, "data.phases=[{samples: 640}, {patch_dropout: 0}]")
    assert accepts("clip", *steps, "data.train=", "data.phases=[{samples: 640, train: a}, {train: b}]")
    assert refusal("clip", *steps, "data.train=", "data.phases=[{samples: 640, train: a}, {}]").startswith(
        "data.train is"
    )
    assert "patch_dropout is for the contrastive stage" in refusal("mim", "data.phases=[{patch_dropout: 0.5}]")


def test_cuda_graphs_name_all_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = "parallel.cuda_graphs=true"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refusal("mim", graphs) == (
        "parallel.cuda_graphs=true needs hardware=auto on a machine with a GPU: set that, or leave the graphs out"
    )
    assert accepts("eval", graphs), "`w2s run` gives its overrides to all steps"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert accepts("clip", graphs, "parallel.recompute=selective")
    assert "needs parallel.recompute=none or selective: " in refusal("mim", graphs, "parallel.recompute=full")
    split = ["parallel.pipeline=2", "train.micro_batch=32"]
    assert "needs parallel.pipeline=1: " in refusal("mim", graphs, *split, ranks=2)
    assert "needs parallel.tensor=1: " in refusal("mim", graphs, "parallel.tensor=2", ranks=2)
    assert "needs model.vision.drop_path=0: " in refusal("mim", graphs, "model.vision.drop_path=0.1")
    phases = "data.phases=[{samples: 64, patch_dropout: 0.5}, {patch_dropout: 0}]"
    assert "needs one patch_dropout in all data.phases: " in refusal("clip", graphs, phases)


def test_a_random_text_tower_at_a_rate_for_a_finished_one_is_doubted() -> None:
    (doubt,) = doubts(load("clip", ["model=eva_18b"]), 1)
    assert doubt == (
        "the text tower starts from random weights at optim.text_lr=4e-05, a rate for a finished one beside "
        "optim.vision_lr=0.0004: name one, such as init.text=teacher, or raise the rate"
    )
    for override in ("init.text=teacher", "init.checkpoint=run", "optim.text_lr=4e-4", "optim.vision_lr=1e-4"):
        assert doubts(load("clip", ["model=eva_18b", override]), 1) == []
    assert doubts(load("clip"), 1) == doubts(load("mim", ["model=eva_18b"]), 1) == []


def test_reading_processes_without_a_lane_are_doubted() -> None:
    (doubt,) = doubts(load("mim", ["data.lanes=32", "data.workers=8"]), 16)
    assert doubt == (
        "data.workers=8 are 2 on each rank, as many as it has of data.lanes=32: use data.lanes=128, or fewer workers"
    )
    assert doubts(load("mim", ["data.lanes=32", "data.workers=8"]), 4) == []
    (doubt,) = doubts(load("mim", ["data.lanes=32", "data.workers=3"]), 4)
    assert doubt == (
        "data.workers=3 do not divide the 8 lanes that a rank reads in a step (data.lanes=32 on 4 ranks): the workers "
        "with more of them hold up the others"
    )


def test_a_teacher_that_cannot_be_split_and_a_text_tower_that_there_is_not() -> None:
    assert "only w2s:RUN can be split" in refusal("mim", "teacher.sharded=true", ranks=2)
    split = ["teacher.source=w2s:x", "teacher.sharded=true", "parallel.pipeline=2", "train.micro_batch=32"]
    assert "use parallel.pipeline=1" in refusal("mim", *split, ranks=2)
    assert "the masked stage has no text tower" in refusal("mim", "init.text=x")
