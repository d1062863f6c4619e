from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.pipeline.launcher import Launcher, overrides
from tests.pipeline.seeded import write_seeded
from w2s.config.naming import run_folder
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.pipeline.runner import run_pipeline
from w2s.processes.elastic import RankError

STEPS = ["weak", "mim", "clip", "scratch", "eval_weak", "eval", "eval_scratch"]


def test_the_steps_run_in_order_in_one_group(launcher: Launcher, tmp_path: Path) -> None:
    report = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps == STEPS
    folders = [run_folder(config) for config in launcher.configs]
    assert {folder.parent for folder in folders} == {report.parent}
    assert report.parent.name.startswith("run-")
    by_name = dict(zip(STEPS, launcher.configs, strict=True))
    assert by_name["mim"].teacher.source == by_name["clip"].teacher.source == f"w2s:{report.parent / 'weak'}"
    assert (by_name["clip"].init.vision, by_name["clip"].init.text) == (str(report.parent / "mim"), "teacher")
    assert by_name["scratch"].init.vision == "none"
    assert by_name["eval"].init.checkpoint == str(report.parent / "clip")
    assert by_name["eval_scratch"].init.checkpoint == str(report.parent / "scratch")


def test_every_step_may_be_started_again(launcher: Launcher, tmp_path: Path) -> None:
    run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False, restarts=3)
    assert launcher.restarts == 3


def test_the_table_and_the_report_show_metrics_beside_their_baselines(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    report = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "masked cosine" in line]
    assert " ".join(row.split()) == "mim masked cosine, test 0.7500 constant 0.2500 61 s 1.5 GiB"
    rows = [line for line in lines if "k-NN top-1" in line]
    assert len(rows) == 3
    assert all("teacher 0.6250" in row for row in rows)
    assert lines[-1] == f"report: {report}"
    assert "constant 0.2500" in report.read_text()


def test_what_went_wrong_with_the_parent_run_is_said_at_the_end(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tmp_path, "tracking.enabled=true", "tracking.uri=nonsense://host")
    run_pipeline("default", given, ranks=1, fresh=False)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: MLflow at nonsense://host could not be used")


def test_a_repeated_command_resumes_at_the_step_that_failed(launcher: Launcher, tmp_path: Path) -> None:
    launcher.broken = "scratch"
    with pytest.raises(RankError):
        run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps == STEPS[:4]
    launcher.broken = ""
    first = launcher.configs[0].run.group
    launcher.configs.clear()
    run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps == STEPS[3:]
    assert {config.run.group for config in launcher.configs} == {first}


def test_fresh_starts_a_new_group_which_is_then_the_one_that_resumes(launcher: Launcher, tmp_path: Path) -> None:
    first = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False).parent
    second = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=True).parent
    assert second.name == f"{first.name}-2"
    assert launcher.steps == STEPS + STEPS
    assert run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False).parent == second
    assert launcher.steps == STEPS + STEPS


def test_nothing_starts_when_a_later_step_cannot_run(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.shards is empty"):
        run_pipeline("default", overrides(tmp_path, "eval:eval.sets={}"), ranks=1, fresh=False)
    assert launcher.configs == []


def learns_best_at_2e_3(config: Config) -> Mapping[str, float]:
    """Higher with every seed; of the learning rates 2e-3 is the best; masked is 0.1 and 0.3 better than scratch."""
    if config.stage == "mim":
        return {"test/masked_cosine": 0.5 + config.run.seed / 100, "test/constant_cosine": 0.25}
    if config.stage == "clip":
        return {"zero_shot/top5": 0.5 - abs(config.optim.lr - 2e-3)}
    gain = {3: 0.1, 5: 0.3}[config.run.seed] if "masked" in config.run.name else 0.0
    return {"open/zero_shot/top1": config.run.seed / 100 + gain, "open/zero_shot/chance_top1": 0.001}


TRAINING = [
    "masked-seed3",
    *(f"masked_clip-seed3-try{trial}" for trial in (1, 2, 3)),
    "masked_clip-seed3",
    *(f"scratch-seed3-try{trial}" for trial in (1, 2, 3)),
    "scratch-seed3",
    "scratch_long-seed3",
    *(f"{step}-seed5" for step in ("masked", "masked_clip", "scratch", "scratch_long")),
]


def test_trials_come_before_the_first_run_of_their_step_and_choose_its_value(
    launcher: Launcher, tmp_path: Path
) -> None:
    launcher.measure = learns_best_at_2e_3
    run_pipeline(write_seeded(tmp_path), overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps[: len(TRAINING)] == TRAINING
    assert all(name.startswith("eval_") for name in launcher.steps[len(TRAINING) :])
    runs = {config.run.name: config for config in launcher.configs}
    steps = ("masked_clip", "scratch")
    assert {runs[f"{step}-seed{seed}"].optim.lr for step in steps for seed in (3, 5)} == {2e-3}


LATE = [pytest.param(name, marks=pytest.mark.slow) for name in ("masked_clip-seed5", "eval_scratch-seed3")]


@pytest.mark.parametrize("broken", ["scratch-seed3-try2", *LATE])
def test_what_is_finished_of_seeds_and_trials_is_not_run_again(broken: str, launcher: Launcher, tmp_path: Path) -> None:
    launcher.measure, launcher.broken = learns_best_at_2e_3, broken
    pipeline = write_seeded(tmp_path)
    with pytest.raises(RankError):
        run_pipeline(pipeline, overrides(tmp_path), ranks=1, fresh=False)
    launcher.broken = ""
    run_pipeline(pipeline, overrides(tmp_path), ranks=1, fresh=False)
    assert [name for name in launcher.steps if launcher.steps.count(name) > 1] == [broken, broken]
    assert len({config.run.group for config in launcher.configs}) == 1
    runs = {config.run.name: config for config in launcher.configs}
    assert runs["scratch-seed5"].optim.lr == 2e-3


def test_tables_and_pictures_of_seeds_are_files_of_their_own(launcher: Launcher, tmp_path: Path) -> None:
    launcher.measure = learns_best_at_2e_3
    report = run_pipeline(write_seeded(tmp_path), overrides(tmp_path), ranks=1, fresh=False)
    folder = report.parent
    for kind in ("md", "json"):
        tables = sorted(path.stem for path in (folder / "tables").glob(f"*.{kind}"))
        assert tables == ["arms", "choices", "cost", "differences", "training"]
    rows = (folder / "tables" / "differences.md").read_text().splitlines()
    # 0.03 + 0.1 - 0.03 and 0.05 + 0.3 - 0.05: mean 0.2, standard deviation 0.2 / sqrt 2
    assert rows[-1].startswith("| eval_masked - eval_scratch | zero-shot top-1, open | 0.2000 ± 0.1414 | 2 of 2 |")
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["contrastive_by_compute.png", "contrastive_by_samples.png", "first_stage.png", "results.png"]
    text = report.read_text()
    assert text.count("data:image/png;base64,") == len(pictures)
    assert "Paired differences, seeds 3, 5" in text


def test_a_metric_that_no_trial_has_is_a_mistake(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"masked_clip: choose\.by=zero_shot/top5 is not a metric of a trial: there are"
    ):
        run_pipeline(write_seeded(tmp_path), overrides(tmp_path), ranks=1, fresh=False)
