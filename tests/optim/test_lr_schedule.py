"""Warm-up, cosine, and a constant rate with a cool-down."""

import numpy as np
import pytest

from w2s.config.load import load
from w2s.config.sections import OptimConfig
from w2s.optim.lr_schedule import falling_weight, lr_factor


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    optim = OptimConfig(warmup=4, schedule=schedule)  # type: ignore[arg-type]
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


def test_a_constant_rate_cools_down_by_one_minus_the_root() -> None:
    optim = OptimConfig(warmup=0, schedule="constant", cooldown=0.25, min_lr=0.1)
    assert {lr_factor(step, 400, optim) for step in range(301)} == {1.0}
    # 1 - sqrt(x) of what lies between the peak and a tenth of it, at x = 1/100, 1/4 and 81/100 of the cool-down
    falling = [lr_factor(step, 400, optim) for step in (301, 325, 381, 400)]
    assert falling == pytest.approx([0.1 + 0.9 * 0.9, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.1, 0.1])


def test_lengths_share_their_first_part() -> None:
    optim = OptimConfig(warmup=5, schedule="constant", cooldown=0.2)
    trunk = OptimConfig(warmup=5, schedule="constant", cooldown=0.0)
    for steps in (50, 100):
        begun = range(round(0.8 * steps) + 1)
        assert [lr_factor(step, steps, optim) for step in begun] == [lr_factor(step, 1000, trunk) for step in begun]


def test_a_weight_falls_to_nothing_at_a_share_of_the_steps() -> None:
    assert [falling_weight(step, 8, until=0.5) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert falling_weight(7, 8, until=None) == 1.0
