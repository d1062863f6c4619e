import json
from pathlib import Path

import pytest

from tests.pipeline.launcher import finished, overrides
from tests.pipeline.lengths import write_lengths
from w2s.config.sections import Config
from w2s.pipeline.comparison import comparison, points, rival, trunk_on_the_way
from w2s.pipeline.plots import draw
from w2s.pipeline.results import Results
from w2s.pipeline.steps import Comparison, load_pipeline
from w2s.pipeline.tasks import Plan
from w2s.pipeline.training_flops import training_flops


def measure(config: Config) -> dict[str, float]:
    """Recall as the arm and the length have it, a hundredth of the seed more; other stages have none."""
    if config.stage != "clip":
        return {}
    arm = {"start": 0.5, "scratch": 0.2, "weak": 0.1}[config.run.name.partition("-")[0].partition("_")[0]]
    return {"retrieval/mean_recall_at_10": arm + config.train.steps / 1000 + config.run.seed / 100}


@pytest.fixture(params=["", "weak"])
def results(tmp_path: Path, request: pytest.FixtureRequest) -> Results:
    """Of a pipeline with a teacher for each seed, and with one that they share."""
    plan = Plan(load_pipeline(write_lengths(tmp_path, shared=request.param)), overrides(tmp_path), fresh=False)
    return finished(plan, measure)


@pytest.fixture
def compare(results: Results) -> Comparison:
    assert results.pipeline.compare is not None
    return results.pipeline.compare


def test_a_length_costs_its_part_of_the_trunk_and_its_cool_down(results: Results, compare: Comparison) -> None:
    found = {point.step.name: point.flops for point in points(results, compare)}
    step = {
        name: training_flops(results.named(name)[0].config) / results.named(name)[0].config.train.steps
        for name in ("weak", "masked", "start", "scratch")
    }
    for length in (20, 80, 320):
        assert found[f"scratch_{length}"] == pytest.approx((length * step["scratch"],) * 2)
    assert found["weak_20"] == pytest.approx((0, 20 * step["weak"]))
    cost = 10 * step["masked"] + 20 * step["start"]
    assert found["start_20"] == pytest.approx((cost, cost + 20 * step["weak"]))


def test_the_rival_costs_no_less(results: Results, compare: Comparison) -> None:
    found = points(results, compare)
    baseline = [point for point in found if point.arm == "scratch"]
    (start,) = [point for point in found if point.step.name == "start_20"]
    for ledger in (0, 1):
        other = rival(start, baseline, ledger)
        assert other is not None
        shorter = [point for point in baseline if point.flops[ledger] < other.flops[ledger]]
        assert other.flops[ledger] >= start.flops[ledger]
        assert all(point.flops[ledger] < start.flops[ledger] for point in shorter)


def test_what_it_is_ahead_by_is_paired(results: Results, compare: Comparison) -> None:
    rows = {row[0]: row for row in comparison(results, compare).rows}
    assert set(rows) == {"weak_10", "weak_20", "start_10", "start_20", "scratch_20", "scratch_80", "scratch_320"}
    row = rows["start_10"]
    length = int(str(row[3]).rpartition("_")[2])
    assert row[1] == "0.5500 ± 0.0141"  # 0.5 + 0.01 + 0.03 or 0.05
    assert row[5] == ", ".join([f"{0.3 + (10 - length) / 1000:+.4f}"] * 2)
    assert rows["scratch_320"][3:6] == ["", "", ""]


def test_a_trunk_on_its_way_begins_after_what_it_builds_on(results: Results, compare: Comparison) -> None:
    runs = results.named("start")
    batch, steps = runs[0].config.train.global_batch, runs[0].config.train.steps
    for run, more in zip(runs, (0.0, 0.2), strict=True):
        lines = [{"step": n, "samples_seen": n * batch, compare.metric: n / 10 + more} for n in (0, steps)]
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    step = {
        name: training_flops((run := results.named(name)[0]).config) / run.config.train.steps
        for name in ("masked", "start")
    }
    (begin, at_first), (end, at_last) = trunk_on_the_way(results, compare, "start", 0)
    assert (at_first, at_last) == pytest.approx((0.1, steps / 10 + 0.1))
    assert (begin * 1e12, end * 1e12) == pytest.approx(
        (10 * step["masked"], 10 * step["masked"] + steps * step["start"])
    )
    counted = trunk_on_the_way(results, compare, "start", 1)
    assert counted[0][0] > begin, "the teacher's training comes first"
    assert trunk_on_the_way(results, compare, "weak", 0) == [], "it is there already"


def test_all_arms_are_in_one_picture(results: Results, tmp_path: Path) -> None:
    assert "by_compute.png" in {path.name for path in draw(results, tmp_path / "pictures")}
