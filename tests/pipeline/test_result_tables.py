from pathlib import Path

import pytest

from tests.pipeline.launcher import Launcher, finished, overrides
from tests.pipeline.seeded import twice_for_masked, write_seeded
from w2s.pipeline.result_tables import arms, by_label, chosen, differences
from w2s.pipeline.results import Results, Run, TrialOutcome, chain_costs, spread
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan
from w2s.pipeline.training_flops import training_flops


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False)


@pytest.fixture
def results(plan: Plan) -> Results:
    return finished(plan, twice_for_masked)


def test_a_value_is_a_mean_with_the_sample_deviation_of_several() -> None:
    assert spread([0.25]) == "0.2500"
    assert spread([0.1, 0.2, 0.6]) == "0.3000 ± 0.2646"  # sqrt((0.04 + 0.01 + 0.09) / 2)


def test_the_arms_stand_beside_each_other_and_chance(results: Results) -> None:
    table = arms(results)
    assert table.columns == ["metric", "eval_masked", "eval_scratch", "eval_scratch_long", "beside"]
    assert table.rows == [
        ["zero-shot top-1, tux", "0.0800 ± 0.0283", "0.0400 ± 0.0141", "0.0400 ± 0.0141", "chance 0.0016"]
    ]


def test_differences_are_taken_seed_by_seed(results: Results) -> None:
    (row,) = differences(results).rows
    # 0.06 - 0.03 and 0.10 - 0.05; paired, they spread less than either arm
    assert row == [
        "eval_masked - eval_scratch",
        "zero-shot top-1, tux",
        "0.0400 ± 0.0141",
        "2 of 2",
        "+0.0300, +0.0500",
    ]


def test_an_arm_costs_all_that_it_builds_on(results: Results) -> None:
    (masked,), (clip,), (arm,) = (
        [step for step in results.pipeline.steps if step.name == name]
        for name in ("masked", "masked_clip", "eval_masked")
    )
    costs = chain_costs(results, arm)
    assert len(costs) == 2
    configs = [results.of(step)[0].config for step in (masked, clip)]
    assert costs[0].samples == 40 * 64 + 20 * 256
    assert costs[0].seconds == 0.25 * (40 + 20)
    assert costs[0].flops == sum(map(training_flops, configs))


def test_of_equal_scores_the_earlier_candidate_wins(plan: Plan) -> None:
    step = plan.pipeline.steps[1]
    trials = [Run(trial, plan.config(trial, {})) for trial in plan.trials(step)]
    write = Launcher(lambda config: {"zero_shot/top5": 0.5 if config.optim.lr > 1e-3 else 0.25})
    for trial in trials:
        write(trial.config, 1)
    assert step.choose is not None
    outcome = TrialOutcome(step, step.choose, trials)
    assert outcome.value == "0.002"
    assert [row[-1] for row in chosen([outcome]).rows] == ["", "chosen", ""]
    assert by_label(trials) == {"zero-shot top-5": [0.25, 0.5, 0.5]}
