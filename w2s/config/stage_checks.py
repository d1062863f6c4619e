"""What the sections say of a stage: its start, its optimizer, data, masks, losses and evaluation."""

from w2s.config.rules import check_rules, written
from w2s.config.sections import Config, EvalConfig
from w2s.config.suites import load_suite
from w2s.errors import ConfigError


def check_optimizer(config: Config) -> None:
    """Refuse an optimizer, a schedule or frozen layers that cannot be.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    check_rules(config, "optim")
    optim, steps = config.optim, config.train.steps
    if optim.warmup >= steps:
        raise ConfigError(
            f"optim.warmup={optim.warmup} must be less than train.steps={steps}: use optim.warmup={steps // 10}"
        )
    if optim.schedule == "constant" and optim.cooldown_start(steps) < optim.warmup:
        raise ConfigError(
            f"optim.cooldown={optim.cooldown:g} of train.steps={steps} begins before the end of "
            f"optim.warmup={optim.warmup}: lower one of them"
        )
    for name in ("vision", "text"):
        lowest, layers = getattr(optim, f"{name}_frozen_layers"), getattr(config.model, name).layers
        if lowest is not None and not 0 <= lowest <= layers:
            raise ConfigError(
                f"optim.{name}_frozen_layers={lowest} must lie between 0 (the embeddings) and "
                f"model.{name}.layers={layers}: leave it out to freeze the whole tower"
            )


def check_init(config: Config) -> None:
    """Refuse a start that brings the same weights twice, or that there is nothing for.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    check_rules(config, "init")
    _check_continued(config)
    _check_averages(config)
    init = config.init
    for key, how in (("init.grow", init.grow), ("init.grow_width", init.grow_width)):
        if how != "none" and (init.checkpoint != "none" or init.vision == init.text == "none"):
            raise ConfigError(
                f"{key}={how} needs a finished tower: name one with init.vision or init.text, or leave it out"
            )


def _check_continued(config: Config) -> None:
    """A checkpoint that is continued from has all towers; `latest` is what a stage takes without being told."""
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
                f"{setting} does nothing with init.checkpoint={init.checkpoint}, which brings all weights: "
                "leave one of them out"
            )


def _check_averages(config: Config) -> None:
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


def check_masked_stage(config: Config) -> None:
    """Refuse masks and losses of the masked stage that cannot be, or would do nothing.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    check_rules(config, "mim")
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
    chosen, layers = [pair.student for pair in config.mim.layers], config.model.vision.layers
    for layer in chosen:
        if layer >= layers:
            raise ConfigError(f"mim.layers: the student has no layer {layer}, its layers are 0 to {layers - 1}")
        if chosen.count(layer) > 1:
            raise ConfigError(f"mim.layers: student={layer} is given twice, a layer has one head: choose another layer")


def check_contrastive_stage(config: Config) -> None:
    """Refuse a loss or a distillation of the contrastive stage that cannot be, or would do nothing.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    check_rules(config, "clip", "clip.distill")
    clip = config.clip
    if clip.logit_scale is not None and clip.logit_scale > clip.logit_scale_max:
        raise ConfigError(
            f"clip.logit_scale={clip.logit_scale:g} is above clip.logit_scale_max={clip.logit_scale_max:g}: "
            "raise the maximum"
        )
    if clip.distill.until_better and not (config.eval.shards and config.train.eval_every):
        raise ConfigError(
            "clip.distill.until_better=true compares student and teacher while training: give eval.shards and a "
            "train.eval_every above 0"
        )


def check_data(config: Config) -> None:
    """Refuse training data that are missing or of another stage, and test sets that are not measured while training.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    check_rules(config, "data", "eval")
    if len(config.eval.resizes) > 1:
        raise ConfigError(f"eval.resize={config.eval.resize} is for w2s stage eval: use crop or squash")
    if config.checkpoint.memory and config.precision.fp8_primary_weights:
        raise ConfigError("checkpoint.memory=true with precision.fp8_primary_weights=true: leave one of them out")
    phases, train = config.data.phases, config.train
    if not config.data.train and not (phases and all(phase.train for phase in phases)):
        raise ConfigError("data.train is empty: give the training shards, such as data.train='shards/{0000..0099}.tar'")
    samples, needed = sum(phase.samples for phase in phases), train.steps * train.global_batch
    if phases and phases[-1].samples and samples != needed:
        raise ConfigError(
            f"data.phases have {samples} samples, but train.steps={train.steps} x train.global_batch="
            f"{train.global_batch} are {needed}: use train.steps={samples // train.global_batch}, or samples: 0 in the "
            "last phase, which lasts to the end"
        )
    for key in ("patch_dropout", "frames"):
        if config.stage != "clip" and any(getattr(phase, key) is not None for phase in phases):
            raise ConfigError(f"data.phases: {key} is for the contrastive stage, not for {config.stage}: remove it")


def check_evaluation(config: Config) -> None:
    """Refuse an evaluation stage without a model or test sets, or with two ways to say them.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    check_rules(config, "train")
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
    suite, root = eval_config.suite, eval_config.root
    if root and not suite:
        raise ConfigError(f"eval.root={root} does nothing without eval.suite: name one, or leave it out")
    if not suite:
        return
    load_suite(suite)
    if not root:
        raise ConfigError(f"eval.suite={suite}: give the folder of its sets in eval.root")
    plain = EvalConfig()
    for name in ("shards", "sets", "knn_shards", "templates", "resize", "retrieval", "equal_captions", "class_key"):
        value, default = getattr(eval_config, name), getattr(plain, name)
        if value != default:
            raise ConfigError(
                f"eval.{name}={written(value)} does nothing with eval.suite={suite}, which says what is measured and "
                f"how: leave it at eval.{name}={written(default)}"
            )
