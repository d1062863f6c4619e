"""The evaluation of a CLIP on one test set and on several."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.stages.conftest import Material, Run
from tests.stages.runs import DEADLINE, QUIET, result, run_stage, start_command
from tests.stages.shape_images import NAMES, draw_shapes
from w2s.data.making.clip_benchmark import BenchmarkSet
from w2s.data.making.items import find_items
from w2s.data.making.make import make_shards


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
    assert {path.stem for path in (several / "pictures").glob("*.png")} == {
        "attention_new",  # of the first set alone
        "classes_new",
        "classes_seen",
        "retrieval_new",
        "retrieval_seen",
    }
    table = json.loads((several / "tables" / "classes_seen.json").read_text())
    assert table["title"] == "best and worst classes of seen"
    run = client.get_run((several / "mlflow_run_id").read_text().strip())
    sources = {data.tags[0].value: json.loads(data.dataset.source)["uri"] for data in run.inputs.dataset_inputs}
    assert sources["evaluation new"] == str(material.test)
    assert run.data.params["eval.sets.new"] == str(material.test)


PROMPT = ["a photo of {c}."]


def write_pictures(folder: Path, seed: int) -> Path:
    """Every shape once, in a folder of its class; a table with five captions of each, and one with two classes."""
    captions, classes = ["image,caption"], ["image,class"]
    for label, image in next(draw_shapes(1, seed)):
        colour, shape = NAMES[label].split()[1:]
        path = folder / NAMES[label] / f"{label}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(image)
        place = path.relative_to(folder)
        words = (f"a {colour} {shape}", f"one {shape} in {colour}", f"{colour}", f"the {shape} {label}", f"no {label}")
        captions += [f"{place},{text}" for text in words]
        classes += [f"{place},{colour}", f"{place},{shape}"]
    (folder / "captions.csv").write_text("\n".join(captions))
    (folder / "classes.csv").write_text("\n".join(classes))
    return folder


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets in CLIP_benchmark's layout: classes (with training images), captions, and several classes an image."""
    root = tmp_path_factory.mktemp("benchmark")
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"), seed=1)
    training = write_pictures(tmp_path_factory.mktemp("training"), seed=2)
    test, train = (BenchmarkSet(split=split, prompts=PROMPT) for split in ("test", "train"))
    for source, name, split in (
        (pictures, "classes", test),
        (training, "classes", train),
        (pictures / "captions.csv", "captions", test),
        (pictures / "classes.csv", "several", test),
    ):
        make_shards(find_items(source), root / f"wds_{name}", shard_size=10, seed=0, workers=1, test_set=split)
    return root


SUITE = """
title: Shapes
resize: better
sets:
  - {name: classes, title: C, folder: wds_classes, metric: mean_of_top1_and_top5}
  - {name: several, folder: wds_several, metric: mean_average_precision, images: 7}
  - {name: captions, title: R, folder: wds_captions, metric: recall}
  - {name: absent, folder: wds_absent, metric: mean_per_class}
means:
  - {name: of_three, title: three, of: [classes, several, captions]}
  - {name: mean, title: all}
published:
  theirs: [10, 20, 30, 40, 50, 60, 70, 80, 90]
"""


def test_a_suite(
    clip: Path, base: list[str], benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("w2s.evaluation.scores.linear_probe.STEPS", 10)
    file = tmp_path / "shapes.yaml"
    file.write_text(SUITE)
    chosen = [f"eval.suite={file}", f"eval.root={benchmark}", "eval.linear_probe=true", "run.name=suite"]
    given = [*base, f"init.checkpoint={clip}", "eval.shards=", "eval.knn_shards=", "tracking.enabled=false", *chosen]
    run = run_stage("eval", given)
    metrics = result(run)["metrics"]
    assert {"classes/zero_shot/top1", "classes/knn/top1", "classes/linear_probe/top1"} <= metrics.keys()
    assert not any(name.startswith(("several/knn", "absent")) for name in metrics)
    columns = [(metrics["classes/zero_shot/top1"] + metrics["classes/zero_shot/top5"]) / 2]
    columns += [metrics["several/zero_shot/mean_average_precision"]]
    for way in ("image_to_text", "text_to_image"):
        columns += [metrics[f"captions/retrieval/{way}_recall_at_{k}"] for k in (1, 5, 10)]
    assert metrics["shapes/of_three"] == pytest.approx(sum(columns) / 8)
    assert "shapes/mean" not in metrics
    table = json.loads((run / "tables" / "suite.json").read_text())
    assert table["columns"][:5] == ["model", "C", "several", "absent", "R text R@1"]
    assert table["columns"][-2:] == ["three", "all"]
    ours, resized, theirs = table["rows"]
    assert ours[:4] == ["clip", f"{100 * columns[0]:.1f}", f"{100 * columns[1]:.1f}", None] and ours[-1] is None
    assert set(resized[1:]) <= {"crop", "squash", None} and resized[3] is None
    assert theirs[-2:] == ["52.5", "50.0"]
    output = capsys.readouterr().out
    assert "1 of 4 sets are missing: absent" in output
    assert "several has 24 images, not 7: its figures are not comparable" in output
    pictures = {path.stem for path in (run / "pictures").glob("*.png")}
    assert pictures == {"attention_classes", "classes_classes", "retrieval_captions"}


def test_squashing_and_cropping_are_both_measured_and_the_better_counts(
    clip: Path, base: list[str], benchmark: Path
) -> None:
    def top1(how: str) -> float:
        options = [f"init.checkpoint={clip}", "eval.shards=", f"eval.sets={{c: {benchmark}/wds_classes/test}}"]
        options += ["eval.knn_shards=", "tracking.enabled=false", "tracking.pictures=0"]
        metrics = result(run_stage("eval", [*base, *options, f"eval.resize={how}", f"run.name=better-{how}"]))[
            "metrics"
        ]
        value: float = metrics["c/zero_shot/top1"]
        return value

    assert top1("better") == max(top1("crop"), top1("squash"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["eval.suite=clip27", "eval.shards="], "eval.suite=clip27: give the folder of its sets in eval.root"),
        (["eval.suite=clip27", "eval.root=x", "eval.shards="], "eval.root=x is not a folder: give the one that has"),
        (["eval.suite=clip27", "eval.root=x", "eval.shards=y"], "eval.shards=y does nothing with eval.suite=clip27"),
        (["eval.root=x"], "eval.root=x does nothing without eval.suite"),
        (["eval.linear_probe=true"], "eval.linear_probe=true has nothing to learn from"),
    ],
)
def test_a_suite_that_cannot_be(clip: Path, base: list[str], w2s: Run, options: list[str], message: str) -> None:
    given = [*base, f"init.checkpoint={clip}", "eval.knn_shards=", "tracking.enabled=false", "run.name=none", *options]
    code, _, error = w2s("stage", "eval", *given)
    assert (code, error.startswith(f"error: {message}")) == (2, True), error


@pytest.mark.slow
@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"], ["parallel.pipeline=2"]])
def test_two_ranks_measure_what_one_measures(
    clip: Path, base: list[str], material: Material, layout: list[str], tmp_path: Path
) -> None:
    """Each rank decodes its share, with a reading process; batches of 7 leave the last one uneven."""
    options = [*base, f"init.checkpoint={clip}", f"eval.shards={material.train}", "eval.batch_size=7", "data.workers=1"]
    options += [f"eval.knn_shards={material.test}", "eval.linear_probe=true", "eval.baselines=false"]
    options += ["tracking.enabled=false"]
    alone = result(run_stage("eval", [*options, "run.name=one", f"run.root={tmp_path}"]))["metrics"]
    command = start_command("stage", "eval", *options, *layout, "run.name=two", f"run.root={tmp_path}", "--nproc", "2")
    assert command.communicate(timeout=5 * DEADLINE)[1] == "" and command.returncode == 0
    together = result(tmp_path / "two")["metrics"]
    # Split matrix products are summed in another order, which may turn one of the 192 images; stages split none.
    assert together == (pytest.approx(alone, abs=1 / 192) if layout == ["parallel.tensor=2"] else alone)
