"""What counts of a suite's set."""

import pytest

from w2s.config.suites import load_suite
from w2s.errors import DataError
from w2s.evaluation.suite import score


def test_a_set_without_its_metric_is_one_line() -> None:
    suite = load_suite("video")
    kinetics = suite.sets[1]
    assert score(kinetics, suite, {"zero_shot/top1": 0.5, "zero_shot/top5": 0.7}) == pytest.approx(0.6)
    with pytest.raises(DataError, match=r"^k400 has no mean_of_top1_and_top5: its samples lack the classes"):
        score(kinetics, suite, {"retrieval/mean_recall_at_1": 1.0})
