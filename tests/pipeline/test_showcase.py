"""The showcase from end to end on a few images: every arm, one seed, a few steps of each training."""

import re
from pathlib import Path

import pytest
import yaml

from tests.stages.runs import run_in_process
from tests.stages.shape_images import write_shapes
from w2s.config.load import read_document
from w2s.pipeline import runner
from w2s.pipeline.runner import run_pipeline
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan

ARMS = ["weak", "scratch", "masked", "summary", "distill", "both", "grown"]
MASKED_STAGES = ["masked_mim", "summary_mim"]
SMALL = [
    "hardware=cpu",
    *(f"model.vision.{size}" for size in ("layers=1", "width=32", "heads=2", "mlp_width=64")),
    *(f"model.text.{size}" for size in ("layers=1", "width=32", "heads=2", "mlp_width=64")),
    *(f"{step}:model.{tower}.layers=2" for step in ("grown", "eval_grown") for tower in ("vision", "text")),
    *(f"{step}:train.steps=2" for step in MASKED_STAGES),
    "train.global_batch=8",
    "train.micro_batch=8",
    "optim.warmup=1",
    "data.workers=0",
    "tracking.system_metrics=false",
]


def one_seed_and_two_candidates(path: Path) -> str:
    """The pipeline with one seed, two candidates of each choice, and lengths of a few steps."""
    document = read_document("run", "showcase")
    document["seeds"] = [1]
    for step in document["steps"]:
        if "choose" in step:
            step["choose"] = step["choose"] | {"among": ["1e-3", "2e-3"], "share": 0.5}
        if "budgets" in step:
            lengths = step["budgets"]["steps"]
            short = ([5, 15] if step["name"] == "scratch" else [3, 5])[-len(lengths) :]
            step["budgets"] = {"steps": short}
            for other in document["steps"]:
                for key, values in other.items():
                    if isinstance(values, list):
                        other[key] = [_shorter(each, step["name"], lengths, short) for each in values]
    document["on_stage"]["mim"] = [_shorter(each, "weak", [7200], [5]) for each in document["on_stage"]["mim"]]
    path.write_text(yaml.safe_dump(document))
    return str(path)


def _shorter(text: str, name: str, lengths: list[int], short: list[int]) -> str:
    for length, other in zip(lengths, short, strict=True):
        text = re.sub(rf"\b{name}_{length}\b", f"{name}_{other}", text)
    return text


def few_images(path: Path) -> str:
    """The data section of the showcase with drawn shapes in the place of its sets."""
    folders = {
        name: str(write_shapes(path.parent / name, 1, seed)) for seed, name in enumerate(("train", "tune", "test"))
    }
    sets = dict.fromkeys(("openmoji", "openmoji_unseen", "tuxpaint"), folders["test"])
    evaluated = {"shards": "", "sets": sets}
    section = {
        "data": {"builtin": "none", "train": folders["train"], "lanes": 1},
        "eval": {"shards": folders["tune"], "knn_shards": folders["train"]},
        "on_stage": {"eval": {"eval": evaluated}},
    }
    path.write_text(yaml.safe_dump(section))
    return str(path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("showcase")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "launch_stage", lambda config, ranks, restarts: run_in_process(config))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        name = one_seed_and_two_candidates(folder / "showcase.yaml")
        data = few_images(folder / "data.yaml")
        return run_pipeline(name, [f"run.root={folder}/runs", f"data={data}", *SMALL], ranks=1, fresh=False)


def rows(report: Path, table: str) -> list[list[str]]:
    lines = (report.parent / "tables" / f"{table}.md").read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_every_arm_is_measured_on_every_test_set(report: Path) -> None:
    header, _, *found = rows(report, "arms")
    assert header == ["metric", *(f"eval_{arm}" for arm in ARMS), "beside"]
    values = {row[0]: row[1:-1] for row in found}
    metrics = [
        "zero-shot top-1",
        "zero-shot top-5",
        "k-NN top-1",
        "image to text, recall at 5",
        "text to image, recall at 5",
        "mean recall at 10",
    ]
    sets = ["openmoji", "openmoji_unseen", "tuxpaint"]
    assert values.keys() == {f"{metric}, {name}" for metric in metrics for name in sets}
    assert all(0 <= float(cell) <= 1 for cells in values.values() for cell in cells)
    assert any("teacher" in row[-1] and "random" in row[-1] for row in found)


@pytest.mark.slow
def test_a_teacher_that_exists_is_paid_in_one_ledger(report: Path) -> None:
    header, _, *found = rows(report, "comparison")
    costs = [place for place, name in enumerate(header) if name.startswith("TFLOP")]
    exists, counted = ({row[0]: float(row[place]) for row in found} for place in costs)
    assert counted["scratch_5"] == exists["scratch_5"]
    for name in ("masked_5", "summary_5", "distill_5", "both_5", "grown_5"):
        assert counted[name] - exists[name] == pytest.approx(counted["weak_5"], rel=2e-3)  # four digits are shown
    assert exists["both_5"] > exists["summary_5"] > exists["scratch_5"]
    assert exists["distill_5"] > exists["scratch_5"]
    assert exists["weak_5"] == 0
    assert exists["weak_on"] == pytest.approx(exists["summary_5"], abs=0.51 * counted["weak_5"] / 5)


def test_every_choice_of_the_real_showcase_is_made_alike() -> None:
    pipeline = load_pipeline("showcase")
    choices = [step.choose for step in pipeline.steps if step.budgets and step.name != "weak"]
    assert len(choices) == len(ARMS) - 1
    assert all(choice == choices[0] for choice in choices)
    assert len(pipeline.seeds) == 3


@pytest.mark.slow
def test_the_real_showcase_can_be_planned() -> None:
    """Every run has a configuration before anything has run, and as many are launched as its page says."""
    configs = Plan(load_pipeline("showcase"), [], fresh=False).configs()
    assert len(configs) == 88
    assert {config.run.seed for config in configs} == {1, 2, 3}
    steps = {config.run.name: config.train.steps for config in configs}
    assert (steps["scratch-seed2"], steps["scratch_960-seed2"], steps["summary_mim-seed3"]) == (768, 960, 480)
    trials = sorted(name for name in steps if "try" in name)
    assert len(trials) == 18 and all("-seed1-" in name for name in trials)
    looking = {config.stage for config in configs if "tuxpaint" in config.eval.by_name}
    assert looking == {"eval"}, "nothing is chosen on the test sets"
    teachers = {Path(each.source).name for config in configs for each in config.stage_teachers}
    assert {name for name in teachers if name.startswith("weak")} == {"weak_7200-seed1"}, "all seeds share it"
