"""The learning rate over the steps, and weights of losses that fall."""

import math

from w2s.config.sections import OptimConfig


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Return the fraction of the peak learning rate at `step` (from 0) of `steps`.

    Linear warm-up, then a cosine down to `optim.min_lr` (baaivision/EVA: EVA-CLIP-18B/shinji/training/scheduler.py, and
    EVA-01/eva/utils.py, whose warm-up begins at zero), or the peak up to a cool-down of the form 1 - sqrt (Hägele et
    al. 2024, arXiv 2405.18392, section 3).
    """
    if step < optim.warmup:
        return step / max(1, optim.warmup - 1) if optim.warmup_from == "zero" else (step + 1) / optim.warmup
    if optim.schedule == "constant":
        fall = _one_minus_root(step, steps, optim)
    else:
        progress = (step - optim.warmup) / max(1, steps - optim.warmup)
        fall = (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (1 - optim.min_lr) * fall


def _one_minus_root(step: int, steps: int, optim: OptimConfig) -> float:
    start = optim.cooldown_start(steps)
    return 1.0 if step <= start else 1 - math.sqrt((step - start) / (steps - start))


def falling_weight(step: int, steps: int, until: float | None) -> float:
    """Return what is left at `step` (from 0) of `steps` of a weight that falls linearly from 1.

    Args:
        step: the step.
        steps: all of them.
        until: fraction of the steps after which nothing is left; None leaves all of it.
    """
    return 1.0 if until is None else max(0.0, 1 - step / (until * steps))
