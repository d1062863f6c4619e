from pathlib import Path

import pytest

from tests.pipeline.launcher import overrides
from tests.pipeline.lengths import STEPS, write_lengths
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan, Task


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(load_pipeline(write_lengths(tmp_path)), overrides(tmp_path), fresh=False)


def configs_of(plan: Plan) -> dict[str, Config]:
    return {config.run.name: config for config in plan.configs()}


def test_each_length_is_a_step_behind_its_trunk(plan: Plan) -> None:
    names = [step.name for step in plan.pipeline.steps]
    assert names == [
        *("weak", "weak_10", "weak_20", "masked", "start", "start_10", "start_20"),
        *("scratch", "scratch_20", "scratch_80", "scratch_320", "eval"),
    ]


def test_a_trunk_is_saved_where_the_cool_downs_begin(plan: Plan) -> None:
    configs = configs_of(plan)
    trunk = configs["scratch-seed3"]
    assert (trunk.optim.schedule, trunk.optim.cooldown, trunk.train.steps) == ("constant", 0, 256)
    assert trunk.checkpoint.keep_at == [16, 64, 256]
    for length in (20, 80, 320):
        branch = configs[f"scratch_{length}-seed3"]
        start = branch.optim.cooldown_start(branch.train.steps)
        assert branch.train.steps == length
        assert start in trunk.checkpoint.keep_at
        folder = plan.folder.absolute() / "scratch-seed3" / "checkpoints" / f"step-{start:08d}"
        assert branch.init.checkpoint == str(folder)


def test_a_length_shares_what_its_trunk_has_chosen(plan: Plan) -> None:
    chosen = {"start": "2e-3"}
    tasks = {task.name: task for task in plan.tasks()}
    assert plan.config(tasks["start-seed5"], chosen).optim.lr == 2e-3
    assert plan.config(tasks["start_10-seed5"], chosen).optim.lr == 2e-3
    assert plan.config(tasks["scratch_20-seed5"], chosen).optim.lr != 2e-3


def test_an_override_of_a_trunk_is_one_of_its_lengths(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_lengths(tmp_path)), overrides(tmp_path, "start:clip.tile=7"), fresh=False)
    tiles = {name.partition("-")[0]: config.clip.tile for name, config in configs_of(plan).items()}
    assert {name for name, tile in tiles.items() if tile == 7} == {"start", "start_10", "start_20"}


def test_a_trial_of_a_trunk_cools_down(plan: Plan) -> None:
    (step,) = [step for step in plan.pipeline.steps if step.name == "start"]
    trial = plan.config(Task(step, 3, 1), {})
    assert (trial.optim.lr, trial.train.steps, trial.optim.cooldown) == (2e-3, 10, 0.5)
    assert trial.checkpoint.keep_at == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[10, 20]}", "[20, 10]}", "weak: budgets.steps=[20, 10]: give rising lengths of at least 2 steps"),
        ("cooldown: 0.5", "cooldown: 1.5", "start: budgets.cooldown=1.5 of 10 steps is none, or all"),
        ("cooldown: 0.5", "cooldown: 0.04", "start: budgets.cooldown=0.04 of 10 steps is none, or all"),
        ("baseline: scratch", "baseline: scrach", "compare: there is no step scrach: did you mean scratch?"),
        ("baseline: scratch", "baseline: masked", "compare.baseline=masked has no budgets"),
        ("[weak]", "[week]", "compare: there is no step week: did you mean weak?"),
        ("name: masked\n", "name: masked\n    trunk: weak\n", "masked: trunk is set by budgets alone"),
        ("{start_20}']}", "{start_20}'], budgets: {steps: [4]}}", "eval: an evaluation trains nothing"),
    ],
)
def test_a_mistake_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    text = STEPS.replace(old, new, 1)
    assert text != STEPS
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^run/") as caught:
        load_pipeline(str(path))
    assert message in str(caught.value)
