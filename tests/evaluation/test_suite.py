"""What counts of a suite's set."""

from pathlib import Path

import pytest

from w2s.config.suites import load_suite
from w2s.errors import DataError
from w2s.evaluation.suite import find_sets, score


def test_a_set_without_its_metric_is_one_line() -> None:
    suite = load_suite("video")
    kinetics = suite.sets[1]
    assert score(kinetics, suite, {"zero_shot/top1": 0.5, "zero_shot/top5": 0.7}) == pytest.approx(0.6)
    with pytest.raises(DataError, match=r"^k400 has no mean_of_top1_and_top5: its samples lack the classes"):
        score(kinetics, suite, {"retrieval/mean_recall_at_1": 1.0})


def test_a_set_without_its_prompts_is_refused_before_others_are_measured(tmp_path: Path) -> None:
    suite = load_suite("clip27")
    with pytest.raises(DataError, match=r"^eval\.root=.*nowhere is not a folder"):
        find_sets("clip27", suite, str(tmp_path / "nowhere"))
    for name in ("wds_cars", "wds_vtab-pets"):
        (tmp_path / name / "test").mkdir(parents=True)
        (tmp_path / name / "zeroshot_classification_templates.txt").write_text("a {c}.")
    assert list(find_sets("clip27", suite, str(tmp_path))) == ["cars", "pets"]
    (tmp_path / "wds_vtab-pets" / "zeroshot_classification_templates.txt").unlink()
    with pytest.raises(DataError, match=r"^eval\.suite=clip27: pets has no .*templates\.txt: write it"):
        find_sets("clip27", suite, str(tmp_path))
