"""Which steps are skipped, beside a few plain lines of Python."""

import math
import statistics

import pytest
import torch

from w2s.optim.guard import StepGuard

CPU = torch.device("cpu")


def norms(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(4)
    values = (2 + torch.randn(count, generator=generator).abs()).tolist()
    return [60.0 if i in (10, 50, 51) else math.nan if i in (20, 70) else value for i, value in enumerate(values)]


def good_steps(values: list[float], window: int, deviations: float) -> list[bool]:
    """The rule, from the list of all norms so far."""
    good, finite = [], []
    for value in values:
        last = finite[-window:]
        spike = False
        if len(finite) >= (window + 1) // 2:
            median = statistics.median_low(last)
            deviation = 1.4826 * statistics.median_low([abs(other - median) for other in last])
            spike = value > median + deviations * max(deviation, 0.05 * median)
        good.append(math.isfinite(value) and not spike)
        finite += [value] if math.isfinite(value) else []
    return good


@pytest.mark.parametrize(("window", "deviations"), [(16, 8.0), (20, 12.0), (16, 0.0)])
def test_the_rule(window: int, deviations: float) -> None:
    guard = StepGuard(window, deviations, CPU)
    judged = [bool(guard.check(torch.tensor(value))) for value in norms(100)]
    expected = good_steps(norms(100), window, deviations) if deviations else [math.isfinite(v) for v in norms(100)]
    assert judged == expected
    assert judged.count(False) == int(guard.skipped) == (5 if deviations else 2)
    assert judged[51] == (not deviations), "the spike before does not hide this one"


def test_in_a_row() -> None:
    guard = StepGuard(4, 20.0, CPU)
    rows = []
    for value in (1.0, math.nan, math.inf, 1.0, math.nan):
        guard.check(torch.tensor(value))
        rows.append(int(guard.consecutive_skips))
    assert rows == [0, 1, 2, 0, 1]


def test_norms_that_stay_higher_are_no_spikes_for_long() -> None:
    guard = StepGuard(8, 10.0, CPU)
    judged = [bool(guard.check(torch.tensor(value))) for value in [1.0] * 8 + [100.0] * 8]
    # The median moves when four of eight are of the new level.
    assert judged == [True] * 8 + [False] * 5 + [True] * 3


def test_it_resumes_from_its_state() -> None:
    values = norms(100)
    whole, first, second = (StepGuard(16, 8.0, CPU) for _ in range(3))
    judged = [bool(whole.check(torch.tensor(value))) for value in values]
    assert [bool(first.check(torch.tensor(value))) for value in values[:45]] == judged[:45]
    second.load(first.state())
    assert [bool(second.check(torch.tensor(value))) for value in values[45:]] == judged[45:]
    other = StepGuard(4, 8.0, CPU)
    other.load(first.state())
    assert int(other.skipped) == int(first.skipped)
