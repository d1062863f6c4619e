"""Floating-point operations of the training of a stage, its teacher's included."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from w2s.config.sections import Config, TeacherConfig
from w2s.planning.flops import stage_flops
from w2s.teachers.build import build_teacher


def training_flops(config: Config) -> float:
    """Model FLOPs of the whole training of a stage: what is computed twice counts once (`w2s/planning/flops.py`)."""
    if config.stage == "mim":
        teacher = config.teacher
        width, once = _teacher(teacher.source, teacher.image_size, config.model.vision.grid, config.run.root)
        sample = stage_flops(config, 1, target_width=width, teacher=once).model
    else:
        sample = stage_flops(config, 1).model
    return sample * config.train.steps * config.train.global_batch


def steps_of_equal_compute(config: Config, others: Sequence[Config]) -> int:
    """How many steps of `config` take as many FLOPs as the whole training of some other stages."""
    one_step = training_flops(config) / config.train.steps
    return max(1, round(sum(map(training_flops, others)) / one_step))


@lru_cache
def _teacher(source: str, image_size: int, grid: int, root: str) -> tuple[int, float]:
    """Channels of a teacher's features, and the operations of its forward pass for one image, counted as it runs."""
    teacher = build_teacher(TeacherConfig(source=source, image_size=image_size), grid=grid, device="cpu", root=root)
    side = teacher.image_size
    # The counter does not know a CPU's flash attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher(torch.zeros(1, 3, side, side))
    return teacher.width, float(counter.get_total_flops())
