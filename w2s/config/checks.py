"""Checks across sections and against the machine: what a user would get wrong is refused before a run starts.

Each subject has a file beside this one.
"""

from operator import attrgetter

import torch

from w2s.config.data_checks import check_data
from w2s.config.eval_checks import check_evaluation, check_evaluation_in_training, check_registered
from w2s.config.fp8_checks import check_fp8_layout, check_linears
from w2s.config.graph_checks import check_graphs
from w2s.config.init_checks import check_init
from w2s.config.layout_checks import check_lanes, check_micro_batches, check_ranks, check_towers
from w2s.config.optim_checks import check_optimizer
from w2s.config.sections import Config, HardwareConfig
from w2s.config.stage_checks import check_contrastive_stage, check_masked_stage
from w2s.config.teacher_checks import check_teachers
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
        check_evaluation(config)
    else:
        _check_training(config, world_size)


def check_settings(config: Config) -> None:
    """Refuse what would be wrong on any number of ranks and any machine.

    Raises:
        ConfigError: with the key, its value and legal values.
    """
    for key, interval in _INTERVALS.items():
        _check_interval(config, key, interval)
    check_registered(config)
    if config.stage == "eval":
        return
    check_optimizer(config)
    check_init(config)
    check_teachers(config)
    if config.stage == "mim":
        check_masked_stage(config)
    else:
        check_contrastive_stage(config)


def _check_training(config: Config, world_size: int) -> None:
    check_data(config)
    check_evaluation_in_training(config)
    if config.checkpoint.memory and config.precision.fp8_primary_weights:
        raise ConfigError("checkpoint.memory=true with precision.fp8_primary_weights=true: leave one of them out")
    check_towers(config)
    check_micro_batches(config, world_size)
    check_lanes(config.data.lanes, config.train.global_batch, world_size, config.parallel)
    check_fp8_layout(config, world_size)
    check_graphs(config)


def _check_interval(config: Config, key: str, interval: str) -> None:
    value = attrgetter(key)(config)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if value is None:
        return
    above = value >= low if interval.startswith("[") else value > low
    below = value <= high if interval.endswith("]") else value < high
    if not (above and below):
        raise ConfigError(f"{key}={value} is outside of {interval}")


def _check_device(hardware: HardwareConfig, local_size: int) -> None:
    cards = torch.cuda.device_count()
    if hardware.device == "cuda" and not cards:
        raise ConfigError("this machine has no GPU that torch can use, but hardware.device=cuda: use hardware=cpu")
    if hardware.device != "cpu" and 0 < cards < local_size:
        raise ConfigError(f"{local_size} ranks on a machine with {cards} GPUs: use --nproc {cards}, or hardware=cpu")
