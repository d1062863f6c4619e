"""Floating-point operations of the training of a stage, its teachers' included."""

from collections.abc import Mapping
from dataclasses import replace

from w2s.config.sections import Config, ModelConfig, ParallelConfig
from w2s.planning.model.flops import stage_flops
from w2s.planning.model.teacher import flops_with_teachers, planned_teachers

Models = Mapping[str, ModelConfig] | None


def training_flops(config: Config, teacher_models: Models = None, begins_at: int = 0) -> float:
    """Model FLOPs of the whole training of a stage: what is computed twice counts once (`w2s/planning/model/flops.py`).

    A teacher of the contrastive stage counts for the steps that it takes part in, as if the student did not pass it
    before.

    Args:
        config: the stage.
        teacher_models: by source, the models of its teachers that are runs still to come.
        begins_at: steps of another run that this one continues from.
    """
    config = replace(config, parallel=ParallelConfig())  # what training needs at least is the same in all layouts
    steps, with_teacher = config.train.steps - begins_at, max(0, config.teacher_steps - begins_at)
    flops = 0.0
    if with_teacher < steps:
        flops += (steps - with_teacher) * stage_flops(config, 1).model
    if teachers := planned_teachers(config, teacher_models):
        flops += with_teacher * flops_with_teachers(config, 1, teachers).model
    return flops * config.train.global_batch


def steps_of_equal_compute(config: Config, flops: float, teacher_models: Models = None) -> int:
    """How many steps of `config` take that many model FLOPs, with its teachers in the same share of them."""
    one_step = training_flops(config, teacher_models) / config.train.steps
    return max(1, round(flops / one_step))
