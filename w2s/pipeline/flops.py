"""Floating-point operations of the training of a stage, its teacher's included."""

from collections.abc import Sequence

from w2s.config.sections import Config
from w2s.planning.flops import stage_flops
from w2s.planning.teacher import planned_teacher


def training_flops(config: Config) -> float:
    """Model FLOPs of the whole training of a stage: what is computed twice counts once (`w2s/planning/flops.py`)."""
    if config.stage == "mim":
        teacher = planned_teacher(config)
        sample = stage_flops(config, 1, target_width=teacher.width, teacher=teacher.flops).model
    else:
        sample = stage_flops(config, 1).model
    return sample * config.train.steps * config.train.global_batch


def steps_of_equal_compute(config: Config, others: Sequence[Config]) -> int:
    """How many steps of `config` take as many FLOPs as the whole training of some other stages."""
    one_step = training_flops(config) / config.train.steps
    return max(1, round(sum(map(training_flops, others)) / one_step))
