import time

import pytest
import torch

from w2s.bench.marks import REST, Marks


class Clock:
    """Continues only when it is told to."""

    seconds = 0.0

    def read(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    return clock


def test_a_moment_belongs_to_the_innermost_part(clock: Clock) -> None:
    marks = Marks(torch.device("cpu"))
    with marks.step():
        clock.seconds += 0.001
        with marks.part("forward"):
            clock.seconds += 0.002
            with marks.part("communication"):
                clock.seconds += 0.004
            clock.seconds += 0.008
        with marks.part("communication"):
            clock.seconds += 0.016
        clock.seconds += 0.032
    (parts,) = marks.read()
    assert parts == pytest.approx({REST: 33, "forward": 10, "communication": 20})


def test_steps_are_read_once_and_nothing_counts_between_them(clock: Clock) -> None:
    marks = Marks(torch.device("cpu"))
    for milliseconds in (1, 2):
        with marks.step(), marks.part("data"):
            clock.seconds += milliseconds / 1e3
        with marks.part("forward"):
            clock.seconds += 1
    first, second = marks.read()
    assert (first["data"], second["data"]) == pytest.approx((1, 2))
    assert "forward" not in first | second
    assert marks.read() == []


def test_a_step_that_failed_leaves_nothing_open(clock: Clock) -> None:
    marks = Marks(torch.device("cpu"))
    with pytest.raises(RuntimeError), marks.step():
        marks.begin("forward")
        raise RuntimeError
    marks.read()
    with marks.step():
        clock.seconds += 0.001
    assert marks.read() == [pytest.approx({REST: 1})]


@pytest.mark.gpu
def test_events_on_a_gpu_see_what_the_host_does_not_wait_for() -> None:
    device = torch.device("cuda")
    marks, square = Marks(device), torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        start = time.perf_counter()
        with marks.step(), marks.part("forward"):
            for _ in range(20):
                square @ square
        host = 1e3 * (time.perf_counter() - start)
    parts = marks.read()[-1]
    # 22 TFLOP cannot take less than the 11 ms of twice an H200's peak; the host is done long before.
    assert parts["forward"] > 11
    assert host < parts["forward"]
