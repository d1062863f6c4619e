import json
from pathlib import Path

import pytest

from w2s import pipeline as pipeline_module
from w2s.config.naming import run_folder
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.launch import RankError
from w2s.pipeline import load_pipeline, resolve, run_pipeline

STEPS = ["mim", "clip", "scratch", "eval", "eval_scratch"]
METRICS = {
    "mim": {"test/masked_cosine": 0.75, "test/constant_cosine": 0.25},
    "clip": {"loss": 1.0},
    "eval": {"zero_shot/top1": 0.125, "zero_shot/chance_top1": 0.001, "knn/top1": 0.5, "knn_teacher/top1": 0.625},
}


class Launcher:
    """Stands in the place of `launch`: notes each configuration and leaves a result, except at one step."""

    def __init__(self) -> None:
        self.configs: list[Config] = []
        self.broken = ""

    def __call__(self, function: object, config: Config, ranks: int) -> None:
        self.configs.append(config)
        if config.run.name == self.broken:
            raise RankError("broken", 1)
        folder = run_folder(config)
        folder.mkdir(parents=True)
        result = {"stage": config.stage, "metrics": METRICS[config.stage], "seconds": 61.4, "peak_memory_gib": 1.5}
        (folder / "result.json").write_text(json.dumps(result))

    @property
    def steps(self) -> list[str]:
        return [config.run.name for config in self.configs]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    launcher = Launcher()
    monkeypatch.setattr(pipeline_module, "launch", launcher)
    return launcher


def overrides(root: Path, *more: str) -> list[str]:
    return [f"run.root={root}", "tracking.enabled=false", "hardware=cpu", *more]


def test_the_steps_run_in_order_in_one_group(launcher: Launcher, tmp_path: Path) -> None:
    report = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps == STEPS
    folders = [run_folder(config) for config in launcher.configs]
    assert {folder.parent for folder in folders} == {report.parent}
    assert report.parent.name.startswith("run-")
    by_name = dict(zip(STEPS, launcher.configs, strict=True))
    assert by_name["clip"].init.vision == str(report.parent / "mim")
    assert by_name["scratch"].init.vision == "none"
    assert by_name["eval"].init.checkpoint == str(report.parent / "clip")
    assert by_name["eval_scratch"].init.checkpoint == str(report.parent / "scratch")


def test_the_baseline_has_the_same_contrastive_budget(tmp_path: Path) -> None:
    configs = resolve(load_pipeline("default"), overrides(tmp_path), fresh=False)
    ours, scratch = configs["clip"], configs["scratch"]
    assert (ours.train, ours.optim, ours.clip, ours.data) == (scratch.train, scratch.optim, scratch.clip, scratch.data)


def test_the_table_and_the_report_show_metrics_beside_their_baselines(
    launcher: Launcher, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    report = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if "masked cosine" in line]
    assert " ".join(row.split()) == "mim masked cosine, test 0.7500 constant 0.2500 61 s 1.5 GiB"
    rows = [line for line in lines if "k-NN top-1" in line]
    assert len(rows) == 2
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


def test_a_repeated_command_goes_on_at_the_step_that_failed(launcher: Launcher, tmp_path: Path) -> None:
    launcher.broken = "scratch"
    with pytest.raises(RankError):
        run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps == STEPS[:3]
    launcher.broken = ""
    first = launcher.configs[0].run.group
    launcher.configs.clear()
    run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False)
    assert launcher.steps == STEPS[2:]
    assert {config.run.group for config in launcher.configs} == {first}


def test_fresh_starts_a_new_group_which_is_then_the_one_that_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    first = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False).parent
    second = run_pipeline("default", overrides(tmp_path), ranks=1, fresh=True).parent
    assert second.name == f"{first.name}-2"
    assert launcher.steps == STEPS + STEPS
    assert run_pipeline("default", overrides(tmp_path), ranks=1, fresh=False).parent == second
    assert launcher.steps == STEPS + STEPS


def test_another_configuration_is_another_group(tmp_path: Path) -> None:
    pipeline = load_pipeline("default")
    groups = {
        resolve(pipeline, overrides(tmp_path, *more), fresh=False)["mim"].run.group
        for more in ([], ["eval:eval.knn_k=3"], ["train.steps=70"], ["data.workers=0"])
    }
    assert len(groups) == 3


def test_overrides_for_all_steps_and_for_one(tmp_path: Path) -> None:
    given = overrides(tmp_path, "train.steps=70", "mim:train.steps=80", "clip:data.train=a:b")
    configs = resolve(load_pipeline("default"), given, fresh=False)
    assert [configs[step].train.steps for step in STEPS] == [80, 70, 70, 70, 70]
    assert configs["clip"].data.train == "a:b"
    assert configs["mim"].data.train != "a:b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mm:train.steps=3", "mm:train.steps=3: there is no step mm: did you mean mim? The steps are mim, clip,"),
        ("run.name=x", "run.name=x: `w2s run` sets run.name itself"),
        ("mim:run.group=x", "mim:run.group=x: `w2s run` sets run.group itself"),
        ("mim:init.vision={clip}", "init.vision={clip}: there is no earlier step clip: there are none"),
        ("clip:train.stepz=3", "unknown key train.stepz: did you mean train.steps?"),
    ],
)
def test_a_mistake_in_an_override(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(load_pipeline("default"), overrides(tmp_path, override), fresh=False)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("title: t\nsteps: [{name: a, stage: mim}, {name: a, stage: clip}]\n", "steps are named ['a', 'a']"),
        ("title: t\nsteps: []\n", "steps are named []"),
        ("title: t\nsteps: [{name: a, stag: mim}]\n", "Key 'stag' not in 'Step'"),
        ("steps: [{name: a, stage: mim}]\n", "title"),
    ],
)
def test_a_mistake_in_a_pipeline(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_starts_when_a_later_step_cannot_run(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.shards is empty"):
        run_pipeline("default", overrides(tmp_path, "eval:eval.shards="), ranks=1, fresh=False)
    assert launcher.configs == []
