import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from w2s.config import Config
from w2s.errors import UserError
from w2s.tracking.about import read_about
from w2s.tracking.history import read_history
from w2s.tracking.mlflow.datasets import DataInput
from w2s.tracking.tracker import Tracker


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_history(run_dir)]


def test_a_whole_run(root: Path, config: Config, client: MlflowClient, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = root / "mim-demo"
    tracker = Tracker(config, run_dir, main=True, facts={"parent_checkpoint": "none"})
    tracker.inputs([DataInput("emoji", "shards", "abc", "training")])
    tracker.log(10, 640, {"loss": -0.5, "grad_norm": 1.25, "lr": 1e-3, "data_wait": 0.034})
    tracker.message("halfway [there]")
    tracker.table("knn", ["metric", "value"], [["top-1", 0.123456]], "Neighbours")
    tracker.picture("masked", lambda path: path.write_bytes(b"PNG"))
    tracker.results({"knn/top1": 0.2}, "Results")
    tracker.finish("FINISHED")
    printed = capsys.readouterr().out
    assert "mim  step 10/40  loss -0.5  grad 1.250  lr 1.00e-03  wait 3%  eta 0:00:0" in printed
    assert "halfway [there]\n" in printed and "0.1235" in printed and "warning" not in printed

    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] == -0.5
    assert run.data.params["optim.betas"] == "(0.9, 0.98)"
    assert run.data.tags["w2s.stage"] == "mim" and run.data.tags["w2s.parent_checkpoint"] == "none"
    uploaded = {file.path for file in client.list_artifacts(str(tracker.run_id))}
    assert uploaded == {"config.yaml", "environment.txt", "report.html", "pictures", "tables"}
    assert [file.path for file in client.list_artifacts(str(tracker.run_id), "tables")] == [
        "tables/knn.json",
        "tables/results.json",
    ]
    assert (run_dir / "pictures" / "masked.png").read_bytes() == b"PNG"
    assert "torch==" in (run_dir / "environment.txt").read_text()
    assert "Neighbours" in (run_dir / "report.html").read_text()


def test_a_resumed_run_resumes_where_its_checkpoint_was(root: Path, config: Config, client: MlflowClient) -> None:
    run_dir = root / "mim-demo"
    killed = Tracker(config, run_dir, main=True)
    for step in (10, 20, 30):
        killed.log(step, step * 64, {"loss": 1.0})
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # what SIGKILL in the middle of a write leaves
    run_id = killed.run_id  # for which the first checkpoint has waited
    longer = replace(config, train=replace(config.train, steps=50))
    resumed = Tracker(longer, run_dir, main=True, resumed_step=20)
    assert steps(run_dir) == [10, 20]
    resumed.log(30, 1920, {"loss": 0.5})
    resumed.finish("FINISHED")
    assert resumed.run_id == run_id
    assert steps(run_dir) == [10, 20, 30]
    assert client.get_run(str(resumed.run_id)).data.params["train.steps"] == "40"
    assert "steps: 40" in (run_dir / "config.yaml").read_text()
    assert "steps: 50" in (run_dir / "config.resumed-20.yaml").read_text()


def test_facts_are_tags_and_a_file_and_a_resumed_run_was_begun_once(
    root: Path, config: Config, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["w2s", "stage", "data.train=https://me:secret@host/a.tar"])
    killed = Tracker(config, root / "x", main=True, facts={"teacher": "small"})
    killed.note(checkpoint="/runs/x/step-20")
    assert killed.run_id  # for which that checkpoint has waited
    first = read_about(root / "x")
    monkeypatch.setattr(sys, "argv", ["w2s", "other"])
    resumed = Tracker(config, root / "x", main=True, resumed_step=20, facts={"teacher": "large"})
    resumed.finish("FINISHED")
    about = read_about(root / "x")
    assert about["command"] == "w2s stage data.train=https://me:***@host/a.tar"
    assert (about["begun"], about["checkpoint"]) == (first["begun"], "/runs/x/step-20")
    assert (first["teacher"], about["teacher"]) == ("small", "large")
    tags = client.get_run(str(resumed.run_id)).data.tags
    assert {f"w2s.{name}": text for name, text in about.items()}.items() <= tags.items()


def test_a_run_without_a_checkpoint_begins_anew(root: Path, config: Config) -> None:
    Tracker(config, root / "x", main=True).log(0, 0, {"loss": 1.0})
    Tracker(config, root / "x", main=True)
    assert steps(root / "x") == []


def test_other_ranks_write_nothing(root: Path, config: Config) -> None:
    before = sorted(root.rglob("*"))
    tracker = Tracker(config, root / "x", main=False)
    tracker.log(10, 640, {"loss": 1.0})
    tracker.message("hello")
    tracker.note(checkpoint="x")
    tracker.table("t", ["a"], [[1]], "T")
    tracker.inputs([DataInput("emoji", "shards", "abc", "training")])
    tracker.artifact(root)
    tracker.picture("p", lambda path: pytest.fail(f"{path} was drawn"))
    tracker.results({"knn/top1": 0.2}, "Results")
    tracker.finish("FINISHED")
    assert tracker.run_id is None
    assert sorted(root.rglob("*")) == before


def test_without_mlflow_the_files_are_there_all_the_same(
    root: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, tracking=replace(config.tracking, enabled=False))
    monkeypatch.setattr("w2s.tracking.mlflow.run.open_run", lambda *_: pytest.fail("MLflow was called"))
    tracker = Tracker(config, root / "x", main=True)
    tracker.log(10, 640, {"loss": math.nan, "lr": math.inf})
    tracker.finish("FINISHED")
    assert tracker.run_id is None and not (root / "x" / "mlflow_run_id").exists()
    record = json.loads((root / "x" / "metrics.jsonl").read_text())
    assert (record["loss"], record["lr"], record["samples_seen"]) == (None, None, 640)
    assert (root / "x" / "report.html").is_file()


def test_a_store_that_fails_is_said_at_the_end(root: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(config, tracking=replace(config.tracking, uri="nonsense://host"))
    tracker = Tracker(config, root / "x", main=True)
    tracker.log(10, 640, {"loss": 1.0})
    tracker.finish("FINISHED")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: MLflow at nonsense://host could not be used")
    assert steps(root / "x") == [10]


def test_the_run_can_be_finished_only_once(root: Path, config: Config, client: MlflowClient) -> None:
    tracker = Tracker(config, root / "x", main=True)
    tracker.finish("KILLED")
    tracker.finish("FINISHED")
    assert client.get_run(str(tracker.run_id)).info.status == "KILLED"


def test_a_folder_that_cannot_be_written_is_one_line(root: Path, config: Config) -> None:
    blocker = root / "file"
    blocker.write_text("")
    with pytest.raises(
        UserError, match=r"cannot write .*file/run/config\.yaml \(Not a directory\): .*run\.root="
    ) as caught:
        Tracker(config, blocker / "run", main=True)
    assert "\n" not in str(caught.value)


def test_a_folder_that_goes_away_while_training_is_one_line(root: Path, config: Config) -> None:
    tracker = Tracker(config, root / "x", main=True)
    (root / "x" / "metrics.jsonl").unlink()
    (root / "x" / "metrics.jsonl").mkdir()
    tracker.log(10, 640, {"loss": 1.0})
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        tracker.finish("FINISHED")
