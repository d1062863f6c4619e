"""Floating-point operations of the training of a stage, its teacher's included."""

from w2s.config.sections import Config, ModelConfig
from w2s.planning.flops import stage_flops
from w2s.planning.teacher import planned_teacher


def training_flops(config: Config, teacher_model: ModelConfig | None = None, begins_at: int = 0) -> float:
    """Model FLOPs of the whole training of a stage: what is computed twice counts once (`w2s/planning/flops.py`).

    Args:
        config: the stage.
        teacher_model: of a masked stage whose teacher is a run that is still to come, that run's model.
        begins_at: steps of another run that this one goes on from, and that are not its own.
    """
    if config.stage == "mim":
        teacher = planned_teacher(config, teacher_model)
        sample = stage_flops(config, 1, **teacher.widths(config.mim), teacher=teacher.flops).model
    else:
        sample = stage_flops(config, 1).model
    return sample * (config.train.steps - begins_at) * config.train.global_batch


def steps_of_equal_compute(config: Config, flops: float) -> int:
    """How many steps of `config`, which has no teacher, take that many model FLOPs."""
    one_step = training_flops(config) / config.train.steps
    return max(1, round(flops / one_step))
