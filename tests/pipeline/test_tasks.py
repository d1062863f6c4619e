from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.pipeline.launcher import by_stage, finished, overrides
from tests.pipeline.seeded import write_seeded
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.pipeline.plots import _compute
from w2s.pipeline.results import chain_costs
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan
from w2s.pipeline.training_flops import training_flops

STEPS = ["weak", "mim", "clip", "scratch", "eval_weak", "eval", "eval_scratch"]


def configs_of(given: Sequence[str], name: str = "default") -> dict[str, Config]:
    """The configurations of a pipeline's runs by the names of their folders."""
    plan = Plan(load_pipeline(name), given, fresh=False)
    return {config.run.name: config for config in plan.configs()}


def test_the_baseline_has_the_compute_of_both_stages_and_is_tuned_alike(tmp_path: Path) -> None:
    configs = configs_of(overrides(tmp_path))
    mim, ours, scratch = configs["mim"], configs["clip"], configs["scratch"]
    assert (ours.model, ours.optim, ours.clip, ours.data) == (scratch.model, scratch.optim, scratch.clip, scratch.data)
    teachers = {each.source: configs["weak"].model for config in (mim, ours) for each in config.stage_teachers}
    paid = training_flops(mim, teachers) + training_flops(ours, teachers)
    # to half a step
    assert abs(training_flops(scratch) - paid) <= training_flops(scratch) / scratch.train.steps / 2


def test_of_the_demo_only_evaluations_look_at_openmoji(tmp_path: Path) -> None:
    for config in configs_of(overrides(tmp_path)).values():
        looked_at = {Path(shards).name for shards in config.eval.by_name.values()}
        assert looked_at == ({"tune", "openmoji"} if config.stage == "eval" else {"tune"})


def test_another_configuration_is_another_group(tmp_path: Path) -> None:
    groups = {
        configs_of(overrides(tmp_path, *more))["mim"].run.group
        for more in ([], ["eval:eval.knn_k=3"], ["train.steps=70"], ["data.workers=0"])
    }
    assert len(groups) == 3


def test_overrides_for_all_steps_and_for_one(tmp_path: Path) -> None:
    given = overrides(tmp_path, "train.steps=70", "mim:train.steps=80", "clip:data.train=a:b")
    configs = configs_of(given)
    others = [step for step in STEPS if step not in ("mim", "scratch")]
    assert {configs[step].train.steps for step in others} == {70}
    assert configs["mim"].train.steps == 80
    assert configs["clip"].data.train == "a:b"
    assert configs["mim"].data.train != "a:b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mm:train.steps=3", "mm:train.steps=3: there is no step mm: did you mean mim? The steps are weak, mim,"),
        ("run.name=x", "run.name=x: `w2s run` sets run.name itself"),
        ("mim:run.group=x", "mim:run.group=x: `w2s run` sets run.group itself"),
        ("mim:init.vision={clip}", "init.vision={clip}: there is no earlier step clip: there are weak"),
        ("clip:train.stepz=3", "unknown key train.stepz: did you mean train.steps?"),
    ],
)
def test_a_mistake_in_an_override(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configs_of(overrides(tmp_path, override))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title: t\nsteps: [{name: a, stage: mim}, {name: a, stage: clip}]\n", "steps are named ['a', 'a']"),
        ("title: t\nsteps: []\n", "steps are named []"),
        ("title: t\nsteps: [{name: a, stag: mim}]\n", "Key 'stag' not in 'Step'"),
        ("steps: [{name: a, stage: mim}]\n", "title"),
        ("title: t\nseeds: [1, 1]\nsteps: [{name: a, stage: mim}]\n", "seeds=[1, 1] has a seed twice"),
        ("title: t\nsteps: [{name: mask, stage: mim, beside: [mas]}]\n", "no step mas: did you mean mask?"),
        ("title: t\non_stage: {mum: []}\nsteps: [{name: a, stage: mim}]\n", "no stage mum: did you mean mim?"),
        ("title: t\nsteps: [{name: a, stage: clip, compute_of: [a]}]\n", "compute_of=['a'] are not earlier steps"),
        (
            "title: t\nsteps: [{name: a, stage: mim, choose: {key: optim.lr, among: [1], by: x}}]\n",
            "choose.among=['1']: give at least two candidates",
        ),
        (
            "title: t\nsteps: [{name: a, stage: mim, choose: {key: optim.lr, among: [1, 2], by: x, share: 0}}]\n",
            "choose.share=0.0 must be in (0, 1]",
        ),
        (
            "title: t\nsteps: [{name: a, stage: eval, choose: {key: optim.lr, among: [1, 2], by: x}}]\n",
            "a: an evaluation trains nothing",
        ),
    ],
)
def test_a_mistake_in_a_pipeline(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_step_is_run_with_every_seed_and_builds_on_its_own_seed(tmp_path: Path) -> None:
    configs = configs_of(overrides(tmp_path), write_seeded(tmp_path))
    for seed in (3, 5):
        assert configs[f"masked-seed{seed}"].run.seed == seed
        assert configs[f"masked_clip-seed{seed}"].run.seed == seed
        assert Path(configs[f"masked_clip-seed{seed}"].init.vision).name == f"masked-seed{seed}"
        assert Path(configs[f"eval_masked-seed{seed}"].init.checkpoint).name == f"masked_clip-seed{seed}"


def test_evaluations_come_after_all_training(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False)
    training = ["masked", "masked_clip", "scratch", "scratch_long"]
    names = [f"{step}-seed{seed}" for seed in (3, 5) for step in training]
    names += [f"eval_{arm}-seed{seed}" for seed in (3, 5) for arm in ("masked", "scratch", "scratch_long")]
    assert [task.name for task in plan.tasks()] == names


def test_a_trial_is_a_share_of_the_step_with_the_first_seed(tmp_path: Path) -> None:
    configs = configs_of(overrides(tmp_path), write_seeded(tmp_path))
    trials = [configs[f"masked_clip-seed3-try{number}"] for number in (1, 2, 3)]
    assert [trial.optim.lr for trial in trials] == [1e-3, 2e-3, 4e-3]
    assert {(trial.train.steps, trial.optim.warmup, trial.run.seed) for trial in trials} == {(10, 2, 3)}
    whole = configs["masked_clip-seed3"]
    assert (whole.train.steps, whole.optim.warmup) == (20, 4)
    assert "masked_clip-seed5-try1" not in configs


def test_what_was_chosen_goes_into_all_seeds(tmp_path: Path) -> None:
    plan = Plan(load_pipeline(write_seeded(tmp_path)), overrides(tmp_path), fresh=False)
    chosen = {"masked_clip": "4e-3"}
    rates = [plan.config(task, chosen).optim.lr for task in plan.tasks() if task.step.name == "masked_clip"]
    assert rates == [4e-3, 4e-3]


def test_a_value_that_the_command_gives_is_not_chosen(tmp_path: Path) -> None:
    configs = configs_of(overrides(tmp_path, "scratch:optim.lr=7e-3"), write_seeded(tmp_path))
    assert configs["scratch-seed3"].optim.lr == configs["scratch-seed5"].optim.lr == 7e-3
    assert "scratch-seed3-try1" not in configs
    assert "masked_clip-seed3-try1" in configs


def test_compute_of_gives_as_many_steps_as_the_flops_of_the_others_pay_for(tmp_path: Path) -> None:
    configs = configs_of(overrides(tmp_path), write_seeded(tmp_path))
    long, masked, clip = (configs[f"{name}-seed5"] for name in ("scratch_long", "masked", "masked_clip"))
    assert long.train.steps > clip.train.steps
    paid = training_flops(masked) + training_flops(clip)
    # to half a step
    assert abs(training_flops(long) - paid) <= training_flops(long) / long.train.steps / 2


_DISTILLED = """
title: distilled
seeds: [3]
overrides: [data=shards, data.train=train, eval.shards=tune, train.steps=40]
steps:
  - {name: weak, stage: clip, overrides: [model=eva_tiny, init.vision=none]}
  - {name: masked, stage: mim, overrides: [model=tiny, 'teacher.source=w2s:{weak}']}
  - {name: long, stage: clip, overrides: [model=tiny, init.vision=none], compute_of: [masked]}
  - {name: distilled, stage: clip, overrides: [model=tiny, init.vision=none, 'clip.distill.source=w2s:{weak}']}
  - {name: longer, stage: clip, overrides: [model=tiny, init.vision=none], compute_of: [distilled]}
  - name: distilled_longer
    stage: clip
    overrides: [model=tiny, init.vision=none, 'clip.distill.source=w2s:{weak}', clip.distill.until=0.5]
    compute_of: [distilled]
"""


def test_a_teacher_that_is_still_to_be_trained_costs_what_one_of_its_model_costs(tmp_path: Path) -> None:
    path = tmp_path / "distilled.yaml"
    path.write_text(_DISTILLED)

    def steps(name: str, *more: str) -> int:
        return configs_of(overrides(tmp_path, *more), str(path))[f"{name}-seed3"].train.steps

    for name, key in (("long", "masked:teacher.source"), ("longer", "distilled:clip.distill.source")):
        assert steps(name) == steps(name, f"{key}=eva:eva_tiny@none") != steps(name, f"{key}=eva:eva_s@none")
    assert 40 < steps("distilled_longer") < steps("longer")


def test_the_seeds_and_the_candidates_belong_to_the_name_of_the_group(tmp_path: Path) -> None:
    def group(**changes: str) -> str:
        configs = configs_of(overrides(tmp_path), write_seeded(tmp_path, **changes))
        return next(iter(configs.values())).run.group

    assert len({group(), group(seeds="[3, 6]"), group(among="[1e-3, 2e-3, 5e-3]"), group(share="0.25")}) == 4


def test_a_pipeline_with_seeds_sets_the_seed_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`w2s run` sets run\.seed itself"):
        configs_of(overrides(tmp_path, "run.seed=7"), write_seeded(tmp_path))


_TRUNK = """
title: A trunk and its branches
seeds: [3, 5]
overrides: [model=tiny, data=shards, data.train=train, eval.shards=tune, optim.schedule=constant]
on_stage: {{clip: [init.vision=none, train.global_batch=256]}}
steps:
  - name: trunk
    stage: clip
    overrides: [optim.cooldown=0, train.steps=90, checkpoint.every=50, 'checkpoint.keep_at=[40]']
  - name: branch
    stage: clip
    overrides: ['init.checkpoint={{trunk}}/checkpoints/step-{step:08d}', train.steps=50]
  - {{name: longer, stage: clip, overrides: ['init.checkpoint={{trunk}}'], compute_of: [branch]}}
  - {{name: eval_branch, stage: eval, overrides: ['init.checkpoint={{branch}}']}}
  - {{name: eval_longer, stage: eval, overrides: ['init.checkpoint={{longer}}']}}
"""


def trunk_plan(folder: Path, step: int = 40) -> Plan:
    path = folder / "trunk.yaml"
    path.write_text(_TRUNK.format(step=step))
    return Plan(load_pipeline(str(path)), overrides(folder), fresh=False)


def test_a_branch_pays_for_its_own_steps(tmp_path: Path) -> None:
    configs = {config.run.name: config for config in trunk_plan(tmp_path).configs()}
    trunk, branch = configs["trunk-seed3"], configs["branch-seed3"]
    cost = training_flops(branch, begins_at=40)
    assert cost == pytest.approx(training_flops(trunk) * 10 / 90)
    assert configs["longer-seed3"].train.steps == 90 + 10
    assert Path(branch.init.checkpoint).parent.parent.name == "trunk-seed3"


def test_a_chain_with_a_branch_has_the_trunk_up_to_there(tmp_path: Path) -> None:
    plan = trunk_plan(tmp_path)
    results = finished(plan, by_stage)
    steps = {step.name: step for step in plan.pipeline.steps}
    per_step = training_flops(results.runs[0].config) / 90
    for name, count in (("eval_branch", 50), ("eval_longer", 100)):
        for cost in chain_costs(results, steps[name]):
            assert (cost.samples, cost.seconds) == (256 * count, 0.25 * count), name
            assert cost.flops == pytest.approx(per_step * count), name
    (place,) = (_compute(results)(run, 256 * 45) for run in results.named("branch")[:1])
    assert place == pytest.approx(per_step * 45 / 1e12)


def test_a_checkpoint_that_will_not_be_kept_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"branch: trunk does not keep a checkpoint of step 41: .*keep_at=\[41\]"):
        trunk_plan(tmp_path, step=41).configs()


def test_the_experiment_of_the_command_line_counts(tmp_path: Path) -> None:
    given = overrides(tmp_path, "tracking.experiment=mine")
    plan = Plan(load_pipeline("default"), given, fresh=False)
    assert {config.tracking.experiment for config in plan.configs()} == {"mine"} == {plan.tracking.experiment}
    assert configs_of(overrides(tmp_path), write_seeded(tmp_path))["masked-seed3"].tracking.experiment == "seeds"


def test_the_run_above_is_there_if_a_step_has_one(tmp_path: Path) -> None:
    given = overrides(tmp_path, "tracking.enabled=true", "weak:tracking.enabled=false")
    assert Plan(load_pipeline("default"), given, fresh=False).tracking.enabled
    assert not Plan(load_pipeline("default"), overrides(tmp_path), fresh=False).tracking.enabled


@pytest.mark.parametrize("key", ["tracking.uri", "tracking.experiment"])
def test_a_step_has_no_place_of_its_own_in_mlflow(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"mim:{key}=x: the steps and the run above them have one {key}"):
        configs_of(overrides(tmp_path, f"mim:{key}=x"))
