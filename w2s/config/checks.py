"""Checks across sections and against the machine: what a user would get wrong is refused before a run starts."""

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter

import torch

from w2s.config.layout import (
    check_lanes,
    check_micro_batches,
    check_ranks,
    check_towers,
    tower_names,
    views_in_phases,
)
from w2s.config.lessons import Lesson
from w2s.config.linears import check_fp8_layout, check_linears
from w2s.config.sections import ClipConfig, Config, EvalConfig, HardwareConfig, InitConfig, MimConfig, OptimConfig
from w2s.config.suites import load_suite
from w2s.errors import ConfigError

_INTERVALS = {
    "mim.min_block": "[1, inf)",
    "mim.block_aspect": "(0, 1]",
    "mim.layers_weight": "(0, inf)",
    "mim.layers_until": "(0, 1]",
    "mim.summary_weight": "[0, inf)",
    "clip.patch_dropout": "[0, 1)",
    "clip.logit_scale": "(0, inf)",
    "clip.tile": "[1, inf)",
    "clip.distill.weight": "(0, inf)",
    "clip.distill.until": "(0, 1]",
    "optim.lr": "(0, inf)",
    "optim.vision_lr": "(0, inf)",
    "optim.text_lr": "(0, inf)",
    "optim.vision_layer_decay": "(0, 1]",
    "optim.text_layer_decay": "(0, 1]",
    "optim.vision_frozen_steps": "[0, inf)",
    "optim.text_frozen_steps": "[0, inf)",
    "optim.cooldown": "[0, 1]",
    "optim.min_lr": "[0, 1]",
    "optim.warmup": "[0, inf)",
    "optim.spike_deviations": "[0, inf)",
    "optim.spike_window": "[1, inf)",
    "optim.ema": "[0, 1)",
    "optim.eps": "(0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.clip_grad": "[0, inf)",
    "init.std": "(0, inf)",
    "teacher.batch_size": "[1, inf)",
    "teacher.image_size": "[0, inf)",
    "train.eval_every": "[0, inf)",
    "train.rollbacks": "[0, inf)",
    "train.check_replicas": "[0, inf)",
    "tracking.pictures": "[0, inf)",
    "eval.batch_size": "[1, inf)",
    "eval.knn_k": "[1, inf)",
    "hardware.timeout": "[5, inf)",
    "hardware.slow_timeout": "[5, inf)",
}
"""Where a number must lie, in the notation of intervals; null is always allowed."""


def check(config: Config, world_size: int, local_size: int) -> None:
    """Refuse what cannot run.

    Args:
        config: the configuration of one stage.
        world_size: ranks in all.
        local_size: ranks on this machine.

    Raises:
        ConfigError: with the key, its value and legal values.
    """
    check_settings(config)
    _check_device(config.hardware, local_size)
    check_ranks(config, world_size)
    check_linears(config)
    if config.stage == "eval":
        _check_eval(config)
    else:
        _check_training(config, world_size)


def check_settings(config: Config) -> None:
    """Refuse what would be wrong on any number of ranks and any machine.

    Raises:
        ConfigError: with the key, its value and legal values.
    """
    for key, interval in _INTERVALS.items():
        _check_interval(config, key, interval)
    _check_registered(config)
    if config.stage == "eval":
        return
    _check_optimizer(config)
    _check_continued(config)
    _check_weights(config)
    _check_growth(config.init)
    _check_teachers(config)
    if config.stage == "mim":
        _check_masks(config)
        _check_layers(config)
        _check_summary(config.mim)
        if config.init.text != "none":
            raise ConfigError(f"init.text={config.init.text}: the masked stage has no text tower, leave init.text out")
    else:
        _check_logits(config.clip)
        _check_distillation(config)


def _check_registered(config: Config) -> None:
    name = config.tracking.register
    if name and config.stage == "mim":
        raise ConfigError(f"tracking.register={name}: the masked stage makes no CLIP, give it to clip or eval alone")
    if name and not config.tracking.enabled:
        raise ConfigError(f"tracking.register={name} is in MLflow: leave out tracking.enabled=false")
    if set(name) & set("/:"):
        raise ConfigError(f"tracking.register={name}: the name of a registered model has no / and no :, use another")


def check_teacher_widths(config: Config, widths: Sequence[int]) -> None:
    """Refuse a teacher of the contrastive stage whose embeddings are to be matched and have other widths.

    Raises:
        ConfigError: they have.
    """
    kind, embed_dim = config.clip.distill.kind, config.model.embed_dim
    if kind != "affinity" and any(width != embed_dim for width in widths):
        raise ConfigError(
            f"clip.distill.kind={kind}: the teacher's embeddings have {widths[0]} channels and "
            f"model.embed_dim={embed_dim}: use clip.distill.kind=affinity, or a student with "
            f"model.embed_dim={widths[0]}"
        )


def doubts(config: Config, world_size: int) -> list[str]:
    """What can run on so many ranks, but is hardly meant: a line each."""
    return [*_rate_of_a_random_text_tower(config), *_idle_workers(config, world_size)]


def _idle_workers(config: Config, world_size: int) -> list[str]:
    lanes, workers = min(config.data.lanes, config.train.global_batch) // world_size, config.data.workers
    if workers <= max(1, lanes):
        if workers and lanes % workers:
            return [
                f"data.workers={workers} do not divide the {lanes} lanes that a rank reads in a step (data.lanes="
                f"{config.data.lanes} on {world_size} ranks): the workers with more of them hold up the others"
            ]
        return []
    return [
        f"data.workers={workers} are {lanes} on each rank, as many as it has of data.lanes={config.data.lanes}: "
        f"use data.lanes={workers * world_size}, or fewer workers"
    ]


def _rate_of_a_random_text_tower(config: Config) -> list[str]:
    """EVA's rates for text are a tenth of those for vision."""
    optim, init = config.optim, config.init
    text, vision = optim.text_lr or optim.lr, optim.vision_lr or optim.lr
    if config.stage != "clip" or {init.text, init.checkpoint} != {"none"} or 5 * text > vision:
        return []
    return [
        f"the text tower starts from random weights at optim.text_lr={text:g}, a rate for a finished one beside "
        f"optim.vision_lr={vision:g}: name one, such as init.text=teacher, or raise the rate"
    ]


def _check_training(config: Config, world_size: int) -> None:
    if not config.data.train and not (config.data.phases and all(phase.train for phase in config.data.phases)):
        raise ConfigError("data.train is empty: give the training shards, such as data.train='shards/{0000..0099}.tar'")
    if config.checkpoint.memory and config.precision.fp8_primary_weights:
        raise ConfigError("checkpoint.memory=true with precision.fp8_primary_weights=true: leave one of them out")
    for key, given in (("eval.sets", config.eval.sets), ("eval.suite", config.eval.suite)):
        if given:
            raise ConfigError(f"{key} is for w2s stage eval: {config.stage} is measured on eval.shards alone")
    if len(config.eval.resizes) > 1:
        raise ConfigError(f"eval.resize={config.eval.resize} is for w2s stage eval: use crop or squash")
    check_towers(config)
    check_micro_batches(config, world_size)
    check_lanes(config.data.lanes, config.train.global_batch, world_size, config.parallel)
    check_fp8_layout(config, world_size)
    _check_frames(config)
    _check_phases(config)
    _check_graphs(config)


def _check_logits(clip: ClipConfig) -> None:
    if clip.logit_scale is not None and clip.logit_scale > clip.logit_scale_max:
        raise ConfigError(
            f"clip.logit_scale={clip.logit_scale:g} is above clip.logit_scale_max={clip.logit_scale_max:g}: "
            "raise the maximum"
        )
    if clip.loss == "softmax" and clip.logit_bias != ClipConfig().logit_bias:
        raise ConfigError(f"clip.logit_bias={clip.logit_bias:g} does nothing with clip.loss=softmax: leave it out")


def _check_continued(config: Config) -> None:
    """A checkpoint that is gone on from has all towers; `latest` is what a stage takes without being told."""
    init, scale = config.init, config.clip.logit_scale
    given = {
        f"init.vision={init.vision}": init.vision not in ("none", "latest"),
        f"init.text={init.text}": init.text != "none",
        f"clip.logit_scale={scale}": config.stage == "clip" and scale is not None,
        f"init.weights={init.weights}": init.weights != "last",
    }
    for setting, is_given in given.items():
        if init.checkpoint != "none" and is_given:
            raise ConfigError(
                f"{setting} does nothing with "
                f"init.checkpoint={init.checkpoint}, which brings all weights: leave one of them out"
            )


def _check_weights(config: Config) -> None:
    """A moving average is there to be measured or taken over."""
    init = config.init
    if config.eval.weights == "ema" and not config.optim.ema:
        raise ConfigError("eval.weights=ema while training needs an average: set optim.ema, such as optim.ema=0.9999")
    if config.eval.weights == "ema" and config.precision.fp8_primary_weights:
        raise ConfigError(
            "eval.weights=ema while training with precision.fp8_primary_weights=true would round the weights again: "
            "measure the average with w2s stage eval"
        )
    if init.weights == "ema" and {init.vision, init.text} <= {"none", "teacher"}:
        raise ConfigError(
            f"init.weights=ema does nothing with init.vision={init.vision} and init.text={init.text}: name a run there"
        )


def _check_growth(init: InitConfig) -> None:
    for key, how in (("init.grow", init.grow), ("init.grow_width", init.grow_width)):
        if how != "none" and (init.checkpoint != "none" or init.vision == init.text == "none"):
            raise ConfigError(
                f"{key}={how} needs a finished tower: name one with init.vision or init.text, or leave it out"
            )


def _check_distillation(config: Config) -> None:
    distill = config.clip.distill
    if distill.source == "none":
        changed = [each.name for each in fields(distill) if getattr(distill, each.name) != each.default]
        if changed:
            raise ConfigError(
                f"clip.distill.{changed[0]} does nothing with clip.distill.source=none: name a teacher, or leave it out"
            )
        return
    if distill.until_better and not (config.eval.shards and config.train.eval_every):
        raise ConfigError(
            "clip.distill.until_better=true compares student and teacher while training: give eval.shards and a "
            "train.eval_every above 0"
        )


def _check_frames(config: Config) -> None:
    if config.stage == "mim" and config.data.frames > 1:
        raise ConfigError(
            f"data.frames={config.data.frames} is for the contrastive stage: the masked stage learns from the middle "
            "frame of a clip, leave it out"
        )


def _check_phases(config: Config) -> None:
    phases, train = config.data.phases, config.train
    if not phases:
        return
    samples, needed = sum(phase.samples for phase in phases), train.steps * train.global_batch
    if phases[-1].samples and samples != needed:
        raise ConfigError(
            f"data.phases have {samples} samples, but train.steps={train.steps} x train.global_batch="
            f"{train.global_batch} are {needed}: use train.steps={samples // train.global_batch}, or samples: 0 in the "
            "last phase, which lasts to the end"
        )
    for key in ("patch_dropout", "frames"):
        if config.stage != "clip" and any(getattr(phase, key) is not None for phase in phases):
            raise ConfigError(f"data.phases: {key} is for the contrastive stage, not for {config.stage}: remove it")


def _check_graphs(config: Config) -> None:
    """CUDA graphs need a GPU, the same shapes in every pass, and one pass at a time."""
    if not config.parallel.cuda_graphs:
        return
    parallel, (frames, dropouts) = config.parallel, map(set, zip(*views_in_phases(config), strict=True))
    fixes = {
        "parallel.tensor=1": parallel.tensor > 1,
        "parallel.pipeline=1": parallel.pipeline > 1,
        "parallel.recompute=none or selective": parallel.recompute == "full",
        "precision.fp8=none": config.precision.fp8 != "none",
        "parallel.overlap_param_gather=false": parallel.overlap_param_gather,
        "model.vision.drop_path=0": config.model.vision.drop_path > 0,
        "one patch_dropout in all data.phases": len(dropouts) > 1,
        "the same frames in all data.phases": len(frames) > 1,
        "mim.layers=[]": config.stage == "mim" and bool(config.mim.layers),
        "hardware=auto on a machine with a GPU": config.hardware.device == "cpu" or not torch.cuda.device_count(),
    }
    needed = [fix for fix, is_needed in fixes.items() if is_needed]
    if needed:
        raise ConfigError(f"parallel.cuda_graphs=true needs {', '.join(needed)}: set that, or leave the graphs out")


def _check_eval(config: Config) -> None:
    if config.init.weights == "ema":
        raise ConfigError("init.weights=ema is for stages that train: use eval.weights=ema")
    _check_suite(config.eval)
    if config.eval.linear_probe and not (config.eval.knn_shards or config.eval.suite):
        raise ConfigError("eval.linear_probe=true has nothing to learn from: give labelled images in eval.knn_shards")
    if not config.eval.by_name and not config.eval.suite:
        raise ConfigError("eval.shards is empty: give the test shards, such as eval.shards='test/{00..09}.tar'")
    if config.eval.sets and config.eval.shards:
        raise ConfigError(
            f"eval.shards={config.eval.shards} and eval.sets are both given: name it in eval.sets, or empty one of them"
        )
    if config.init.checkpoint == "none":
        raise ConfigError("init.checkpoint=none leaves nothing to evaluate: give a clip run, or latest")


def _check_suite(eval_config: EvalConfig) -> None:
    """A suite is all that is measured, and says how."""
    if not eval_config.suite:
        if eval_config.root:
            raise ConfigError(
                f"eval.root={eval_config.root} does nothing without eval.suite: name one, or leave it out"
            )
        return
    load_suite(eval_config.suite)
    if not eval_config.root:
        raise ConfigError(f"eval.suite={eval_config.suite}: give the folder of its sets in eval.root")
    plain = EvalConfig()
    for name in ("shards", "sets", "knn_shards", "templates", "resize", "retrieval", "equal_captions", "class_key"):
        if getattr(eval_config, name) != getattr(plain, name):
            raise ConfigError(
                f"eval.{name}={getattr(eval_config, name)} does nothing with eval.suite={eval_config.suite}, which "
                f"says what is measured and how: leave it at eval.{name}={getattr(plain, name)}"
            )


def _check_interval(config: Config, key: str, interval: str) -> None:
    value = attrgetter(key)(config)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if value is None:
        return
    above = value >= low if interval.startswith("[") else value > low
    below = value <= high if interval.endswith("]") else value < high
    if not (above and below):
        raise ConfigError(f"{key}={value} is outside of {interval}")


def _check_optimizer(config: Config) -> None:
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas={list(config.optim.betas)} must lie in [0, 1), such as [0.9, 0.98]")
    _check_trust_ratio(config.optim)
    _check_schedule(config.optim, config.train.steps)
    for name in ("vision", "text"):
        _check_frozen(config, name)


def _check_frozen(config: Config, name: str) -> None:
    steps, lowest = (getattr(config.optim, f"{name}_frozen_{what}") for what in ("steps", "layers"))
    layers = getattr(config.model, name).layers
    if steps and name not in tower_names(config):
        raise ConfigError(f"optim.{name}_frozen_steps={steps}: the masked stage has no text tower, leave it out")
    if lowest is not None and not steps:
        raise ConfigError(
            f"optim.{name}_frozen_layers={lowest} does nothing without optim.{name}_frozen_steps: set both"
        )
    if lowest is not None and not 0 <= lowest <= layers:
        raise ConfigError(
            f"optim.{name}_frozen_layers={lowest} must lie between 0 (the embeddings) and "
            f"model.{name}.layers={layers}: leave it out to freeze the whole tower"
        )


def _check_schedule(optim: OptimConfig, steps: int) -> None:
    if optim.warmup >= steps:
        raise ConfigError(
            f"optim.warmup={optim.warmup} must be less than train.steps={steps}: use optim.warmup={steps // 10}"
        )
    if optim.schedule == "cosine" and optim.cooldown != OptimConfig().cooldown:
        raise ConfigError(
            f"optim.cooldown={optim.cooldown:g} does nothing with optim.schedule=cosine: use optim.schedule=constant"
        )
    if optim.schedule == "constant" and optim.cooldown_start(steps) < optim.warmup:
        raise ConfigError(
            f"optim.cooldown={optim.cooldown:g} of train.steps={steps} begins before the end of "
            f"optim.warmup={optim.warmup}: lower one of them"
        )


def _check_trust_ratio(optim: OptimConfig) -> None:
    if optim.name != "lamb" and optim.trust_1d != "auto":
        raise ConfigError(
            f"optim.trust_1d={optim.trust_1d} does nothing with optim.name={optim.name}: "
            "use optim.name=lamb or optim.trust_1d=auto"
        )
    if optim.trust_ratio is None:
        return
    low, high = optim.trust_ratio
    if optim.name != "lamb":
        raise ConfigError(
            f"optim.trust_ratio=[{low:g}, {high:g}] does nothing with optim.name={optim.name}: "
            "use optim.name=lamb or optim.trust_ratio=null"
        )
    if not 0 < low <= high:
        raise ConfigError(
            f"optim.trust_ratio=[{low:g}, {high:g}] must be two rising numbers above 0, such as [0.01, 10]"
        )


def _check_summary(mim: MimConfig) -> None:
    if mim.summary != MimConfig().summary and not mim.summary_weight:
        raise ConfigError(
            f"mim.summary={mim.summary} does nothing with mim.summary_weight=0: set a weight or leave it out"
        )


def _check_teachers(config: Config) -> None:
    names = [entry.name for entry in config.teachers.of]
    if config.teachers.draw == "one" and len(names) < 2:
        raise ConfigError("teachers.draw=one draws one of several teachers: give teachers=[...] or leave it out")
    if config.stage != "mim":
        if names:
            raise ConfigError(f"teachers={names}: several teach the masked stage alone, the others have teacher=NAME")
        if config.init.teacher and config.init.vision == "none":
            raise ConfigError(
                f"init.teacher={config.init.teacher} does nothing with init.vision=none: name a masked run"
            )
        return
    if config.init.teacher:
        raise ConfigError(f"init.teacher={config.init.teacher} is for the contrastive stage: leave it out")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise ConfigError(f"teachers: name={name} must be letters, digits, _ and -: use another")
        if names.count(name) > 1:
            raise ConfigError(f"teachers: two are called {name}: give each a name of its own")
    _check_draw(config)
    for lesson in config.lessons:
        _check_lesson(lesson, "teachers: " if names else "")


def _check_draw(config: Config) -> None:
    one, lessons = config.teachers.draw == "one", config.lessons
    for lesson in lessons:
        name, share = lesson.teacher.name, lesson.share
        if not 0 < share < math.inf:
            raise ConfigError(f"teachers: {name} has share={share:g}, which must be above 0: leave the teacher out")
        if share != 1 and not one:
            raise ConfigError(f"teachers: {name} has share={share:g}, which does nothing with teachers.draw=all")
    some = "draw=one" if one else next((f"{each.teacher.name}.sources" for each in lessons if each.sources), "")
    if some and config.teacher.sharded:
        raise ConfigError(
            f"teacher.sharded=true with teachers.{some}: ranks that hold a teacher together must run it on as many "
            "images each, and some samples have other teachers: use teacher.sharded=false"
        )


def _check_lesson(lesson: Lesson, where: str) -> None:
    name = f"{where}{lesson.teacher.name} has "
    if lesson.weight <= 0:
        raise ConfigError(f"{name}weight={lesson.weight:g}, which must be above 0: leave the teacher out")
    if lesson.summary_weight < 0:
        raise ConfigError(f"{name}summary_weight={lesson.summary_weight:g}, which must be at least 0")
    if lesson.teacher.image_size < 0:
        raise ConfigError(f"{name}image_size={lesson.teacher.image_size}, which must be at least 0")
    if lesson.teacher.target_norm == "phi_s" and lesson.loss == "cosine":
        raise ConfigError(
            f"{name}target_norm=phi_s, a rotation and a scale, which cancel under the cosine loss: use mse, smooth_l1, "
            "or another target_norm"
        )


def _check_masks(config: Config) -> None:
    masked, patches = config.mim.masked_patches, config.model.vision.patches
    if not 0 <= masked < patches:
        raise ConfigError(
            f"mim.masked_patches={masked} must lie between 0 and {patches - 1}: an image has {patches} patches, "
            f"EVA masks 40 %, use mim.masked_patches={max(1, round(0.4 * patches))}"
        )
    if masked and config.mim.min_block > masked:
        raise ConfigError(
            f"mim.min_block={config.mim.min_block} is more than mim.masked_patches={masked}: "
            f"use mim.min_block={max(1, masked // 4)}"
        )


def _check_layers(config: Config) -> None:
    chosen, layers = [pair.student for pair in config.mim.layers], config.model.vision.layers
    for key in ("layers_weight", "layers_until"):
        value = getattr(config.mim, key)
        if value != getattr(MimConfig(), key) and not chosen:
            raise ConfigError(f"mim.{key}={value} does nothing with mim.layers=[]: choose layers or leave it out")
    for layer in chosen:
        if layer >= layers:
            raise ConfigError(f"mim.layers: the student has no layer {layer}, its layers are 0 to {layers - 1}")
        if chosen.count(layer) > 1:
            raise ConfigError(f"mim.layers: student={layer} is given twice, a layer has one head: choose another layer")


def _check_device(hardware: HardwareConfig, local_size: int) -> None:
    cards = torch.cuda.device_count()
    if hardware.device == "cuda" and not cards:
        raise ConfigError("this machine has no GPU that torch can use, but hardware.device=cuda: use hardware=cpu")
    if hardware.device != "cpu" and 0 < cards < local_size:
        raise ConfigError(f"{local_size} ranks on a machine with {cards} GPUs: use --nproc {cards}, or hardware=cpu")
