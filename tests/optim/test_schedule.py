"""Warm-up and cosine."""

import numpy as np
import pytest

from w2s.config.load import load
from w2s.config.sections import OptimConfig
from w2s.optim.schedule import lr_factor


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    optim = OptimConfig(warmup=4)
    assert [lr_factor(step, 20, optim) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 20, optim) == 1.0


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_warm_up_from_zero_is_numpys_linspace(warmup: int) -> None:
    optim = OptimConfig(warmup=warmup, warmup_from="zero")
    factors = [lr_factor(step, 20, optim) for step in range(warmup)]
    assert factors == pytest.approx(np.linspace(0, 1, warmup))
    assert lr_factor(warmup, 20, optim) == 1.0


def test_each_stage_warms_up_as_released() -> None:
    assert [load(stage).optim.warmup_from for stage in ("mim", "clip")] == ["zero", "step"]


def test_cosine_passes_its_middle_and_ends_at_the_minimum() -> None:
    optim = OptimConfig(warmup=0, min_lr=0.1)
    assert lr_factor(50, 100, optim) == pytest.approx(0.55)
    assert lr_factor(100, 100, optim) == pytest.approx(0.1)
    factors = [lr_factor(step, 100, optim) for step in range(100)]
    assert factors == sorted(factors, reverse=True)
