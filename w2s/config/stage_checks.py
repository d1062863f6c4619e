"""What the sections of the two training stages may say, `mim` and `clip`."""

from dataclasses import fields

from w2s.config.sections import ClipConfig, Config, MimConfig
from w2s.errors import ConfigError


def check_masked_stage(config: Config) -> None:
    """Refuse masks and losses of the masked stage that cannot be, or would do nothing.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    _check_masks(config)
    _check_layers(config)
    _check_summary(config.mim)


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


def _check_summary(mim: MimConfig) -> None:
    if mim.summary != MimConfig().summary and not mim.summary_weight:
        raise ConfigError(
            f"mim.summary={mim.summary} does nothing with mim.summary_weight=0: set a weight or leave it out"
        )


def check_contrastive_stage(config: Config) -> None:
    """Refuse a loss or a distillation of the contrastive stage that cannot be, or would do nothing.

    Raises:
        ConfigError: with the key, its value and legal ones.
    """
    _check_logits(config.clip)
    _check_distillation(config)


def _check_logits(clip: ClipConfig) -> None:
    if clip.logit_scale is not None and clip.logit_scale > clip.logit_scale_max:
        raise ConfigError(
            f"clip.logit_scale={clip.logit_scale:g} is above clip.logit_scale_max={clip.logit_scale_max:g}: "
            "raise the maximum"
        )
    if clip.loss == "softmax" and clip.logit_bias != ClipConfig().logit_bias:
        raise ConfigError(f"clip.logit_bias={clip.logit_bias:g} does nothing with clip.loss=softmax: leave it out")


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
