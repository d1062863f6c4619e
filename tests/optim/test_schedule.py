"""Warm-up and cosine."""

import pytest

from w2s.config.sections import OptimConfig
from w2s.optim.schedule import lr_factor


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    optim = OptimConfig(warmup=4)
    assert [lr_factor(step, 20, optim) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 20, optim) == 1.0


def test_cosine_passes_its_middle_and_ends_at_the_minimum() -> None:
    optim = OptimConfig(warmup=0, min_lr=0.1)
    assert lr_factor(50, 100, optim) == pytest.approx(0.55)
    assert lr_factor(100, 100, optim) == pytest.approx(0.1)
    factors = [lr_factor(step, 100, optim) for step in range(100)]
    assert factors == sorted(factors, reverse=True)
