"""The evaluation of a CLIP on one test set and on several."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.stages.conftest import Material
from tests.stages.runs import QUIET, result, run_stage


@pytest.fixture(scope="module")
def clip(base: list[str]) -> Path:
    return run_stage("clip", [*base, *QUIET, "init.vision=none", "run.name=clip"])


@pytest.fixture(scope="module")
def several(clip: Path, base: list[str], material: Material) -> Path:
    sets = f"eval.sets={{new: {material.test}, seen: {material.train / '000000.tar'}}}"
    return run_stage("eval", [*base, f"init.checkpoint={clip}", "eval.shards=", sets, "run.name=several"])


def metrics_of(base: list[str], clip: Path, shards: Path, name: str) -> dict[str, Any]:
    options = [f"init.checkpoint={clip}", f"eval.shards={shards}", f"run.name={name}", "tracking.enabled=false"]
    metrics: dict[str, Any] = result(run_stage("eval", [*base, *options]))["metrics"]
    return metrics


def test_several_sets_measure_what_each_measures_alone(
    several: Path, clip: Path, base: list[str], material: Material
) -> None:
    alone = {
        "new": metrics_of(base, clip, material.test, "new"),
        "seen": metrics_of(base, clip, material.train / "000000.tar", "seen"),
    }
    assert {"zero_shot/top1", "retrieval/image_to_text_recall_at_1", "knn/top1", "knn_teacher/top1"} <= set(
        alone["new"]
    )
    assert alone["new"] != alone["seen"]
    assert result(several)["metrics"] == {
        f"{name}/{key}": value for name in alone for key, value in alone[name].items()
    }


def test_each_set_has_its_picture_table_and_entry_in_mlflow(
    several: Path, client: MlflowClient, material: Material
) -> None:
    assert {path.stem for path in (several / "pictures").glob("*.png")} == {"classes_new", "classes_seen"}
    table = json.loads((several / "tables" / "classes_seen.json").read_text())
    assert table["title"] == "best and worst classes of seen"
    run = client.get_run((several / "mlflow_run_id").read_text().strip())
    sources = {data.tags[0].value: json.loads(data.dataset.source)["uri"] for data in run.inputs.dataset_inputs}
    assert sources["evaluation new"] == str(material.test)
    assert run.data.params["eval.sets.new"] == str(material.test)
