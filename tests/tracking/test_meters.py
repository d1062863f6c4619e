import psutil
import pytest
import torch

from w2s.tracking.meters import StepMeter, over_ranks, peak_memory_gib


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_and_waiting_since_the_last_reading() -> None:
    clock = Clock()
    meter = StepMeter(torch.device("cpu"), clock)
    clock.now += 1.0
    meter.update(64, wait_seconds=0.5)
    clock.now += 3.0
    meter.update(64, wait_seconds=1.0)
    first = meter.read()
    assert first["samples_per_second"] == pytest.approx(32.0)
    assert first["seconds_per_step"] == pytest.approx(2.0)
    assert first["data_wait"] == pytest.approx(0.25)
    clock.now += 2.0
    meter.update(64, wait_seconds=1.2)
    second = meter.read()
    assert second["samples_per_second"] == pytest.approx(32.0)
    assert second["data_wait"] == pytest.approx(0.1)


def test_an_evaluation_does_not_count() -> None:
    clock = Clock()
    meter = StepMeter(torch.device("cpu"), clock)
    clock.now += 1.0
    meter.update(10, wait_seconds=0.0)
    with meter.paused():
        clock.now += 50.0
    assert meter.read()["seconds_per_step"] == pytest.approx(1.0)


def test_nothing_is_read_without_steps() -> None:
    assert StepMeter(torch.device("cpu")).read() == {}


def test_peak_memory_is_in_gib() -> None:
    resident = psutil.Process().memory_info().rss / 2**30
    assert resident * 0.9 <= peak_memory_gib(torch.device("cpu")) <= psutil.virtual_memory().total / 2**30


def test_the_slowest_rank_has_a_number() -> None:
    figures = [{"data_wait": value, "memory_gib": 1.0} for value in (0.1, 0.2, 0.9, 0.3)]
    assert over_ranks(figures, ["data_wait"]) == {
        "ranks/data_wait_min": 0.1,
        "ranks/data_wait_median": 0.25,
        "ranks/data_wait_max": 0.9,
        "ranks/data_wait_slowest": 2.0,
    }
    assert over_ranks(figures[:1], ["data_wait"]) == {}
