"""The learning rate over the steps."""

import math

from w2s.config.sections import OptimConfig


def lr_factor(step: int, steps: int, optim: OptimConfig) -> float:
    """Return the fraction of the peak learning rate at `step` (from 0) of `steps`.

    Linear warm-up, then a cosine down to `optim.min_lr` (baaivision/EVA, shinji/training/scheduler.py).
    """
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    progress = (step - optim.warmup) / max(1, steps - optim.warmup)
    return optim.min_lr + (1 - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2
