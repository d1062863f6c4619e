"""What finished runs leave behind: for a person, for MLflow, and for `w2s run`."""

import base64
import platform
import re
from pathlib import Path

import mlflow.data
import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from PIL import Image
from safetensors.torch import load_file

from tests.stages.conftest import Run
from tests.stages.runs import history, records, result, run_in_process, run_stage
from w2s.checkpoint.own.checkpoint_folders import latest
from w2s.config.load import load, to_yaml
from w2s.config.sections import Config
from w2s.pipeline import runner as pipeline
from w2s.tracking.about import read_about
from w2s.tracking.report.charts import bokeh_script

PIPELINE = str(Path(__file__).with_name("five_steps.yaml"))
STEPS = ("mim", "clip", "scratch", "eval", "eval_scratch")


@pytest.fixture(scope="module")
def group(base: list[str], root: Path) -> Path:
    """The folder of a `w2s run` of the five steps, its stages in this process."""
    launched = []

    def launch(config: Config, ranks: int, restarts: int) -> None:
        launched.append(config.run.name)
        run_in_process(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "launch_stage", launch)
        report = pipeline.run_pipeline(PIPELINE, [*base, "clip:tracking.register=shapes"], ranks=1, fresh=False)
    assert tuple(launched) == STEPS
    return report.parent


def embedded(report: Path) -> set[bytes]:
    # BokehJS has icons, and addresses for formulas and maps, which a report does not have.
    page = report.read_text().replace(bokeh_script(), "")
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", page), "a report needs no network"
    return {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([\w+/=]+)", page)}


def mlflow_run(client: MlflowClient, folder: Path) -> MlflowRun:
    return client.get_run((folder / "mlflow_run_id").read_text().strip())


def test_the_configuration_is_the_printed_one(w2s: Run, base: list[str]) -> None:
    options = [*base, "run.name=printed", "train.steps=2"]
    code, printed, _ = w2s("stage", "mim", *options, "--print-config")
    run = run_stage("mim", options)
    assert code == 0
    assert (run / "config.yaml").read_text() == printed == to_yaml(load("mim", options))


def test_metrics_by_step_and_samples(group: Path) -> None:
    for step in ("mim", "clip"):
        rows = [record for record in records(group / step) if "loss" in record]
        assert [(row["step"], row["samples_seen"]) for row in rows] == [(1, 16), (2, 32), (3, 48), (4, 64)]
        assert all(row["samples_per_second"] > 0 and 0 <= row["data_wait"] <= 1 for row in rows)
        final = records(group / step)[-1]
        assert final.items() >= result(group / step)["metrics"].items()


def test_pictures_are_in_the_report(group: Path) -> None:
    expected = {
        "mim": {"masked", "features", "attention"},
        "clip": set(),
        "eval": {"classes", "retrieval", "attention"},
    }
    drawn = set()
    for step, names in expected.items():
        pictures = {path.stem: path for path in (group / step / "pictures").glob("*.png")}
        assert pictures.keys() == names
        for path in pictures.values():
            image = Image.open(path)
            assert min(image.size) > 64
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 16, f"{path} is blank"
        files = {path.read_bytes() for path in pictures.values()}
        assert embedded(group / step / "report.html") == files
        drawn |= files
    assert embedded(group / "report.html") >= drawn


def test_mlflow_has_metrics_pictures_and_the_data(group: Path, client: MlflowClient) -> None:
    run = mlflow_run(client, group / "mim")
    points = client.get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in points} == dict(enumerate(history(group / "mim", "loss"), start=1))
    samples = client.get_metric_history(run.info.run_id, "samples_seen")
    assert {(point.step, point.value) for point in samples} == {(step, 16.0 * step) for step in range(5)}
    drawn = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert drawn == {f"pictures/{name}.png" for name in ("attention", "features", "masked")}
    assert run.inputs is not None
    sources = {}
    for data in run.inputs.dataset_inputs:
        assert re.fullmatch(r"[0-9a-f]{12}", data.dataset.digest)
        ((key, context),) = [(tag.key, tag.value) for tag in data.tags]
        assert key == "mlflow.data.context"
        sources[context] = mlflow.data.get_source(data).uri
    keys = {"training": "data.train", "evaluation": "eval.shards", "neighbours": "eval.knn_shards"}
    assert sources == {context: run.data.params[key] for context, key in keys.items()}


def test_the_stages_of_a_pipeline_are_children_of_one_run(group: Path, client: MlflowClient) -> None:
    parent = mlflow_run(client, group)
    assert (parent.info.run_name, parent.info.status) == (group.name, "FINISHED")
    children = [mlflow_run(client, group / step) for step in STEPS]
    assert {child.data.tags[MLFLOW_PARENT_RUN_ID] for child in children} == {parent.info.run_id}
    assert [child.info.run_name for child in children] == list(STEPS)
    found = client.search_runs([parent.info.experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'")
    assert len(found) == len(STEPS)


def test_the_run_above_has_parameters_and_headlines_of_every_step(group: Path, client: MlflowClient) -> None:
    parent = mlflow_run(client, group)
    assert parent.data.params["scratch.init.vision"] == "none"
    assert parent.data.params["clip.init.vision"] == "{mim}"
    assert parent.data.params["mim.train.steps"] == parent.data.params["scratch.train.steps"] == "4"
    assert parent.data.params["clip.model"] == "tiny" and "clip.run.root" not in parent.data.params
    for step, name in (("mim", "knn/top1"), ("clip", "zero_shot/top1"), ("eval", "zero_shot/top5")):
        assert parent.data.metrics[f"{step}/{name}"] == result(group / step)["metrics"][name]
    assert "mim/test/masked_cosine" in parent.data.metrics and "loss" not in parent.data.metrics
    assert "zero-shot top-1" in parent.data.tags["mlflow.note.content"]


def test_tags_say_where_a_run_is_and_what_it_comes_from(group: Path, client: MlflowClient) -> None:
    mim, clip, evaluation = (mlflow_run(client, group / step) for step in ("mim", "clip", "eval"))
    last = (group / "clip" / "checkpoints" / "step-00000004").absolute()
    assert clip.data.tags["w2s.checkpoint"] == evaluation.data.tags["w2s.checkpoint"] == str(last)
    assert clip.data.tags["w2s.parent_checkpoint"] == str(latest(group / "mim"))
    assert clip.data.tags["w2s.parent_runs"] == mim.info.run_id
    assert evaluation.data.tags["w2s.parent_runs"] == clip.info.run_id
    assert mim.data.tags["w2s.teacher"] == mim.data.params["teacher.source"]
    assert mim.data.tags["w2s.host"] == platform.node() and mim.data.tags["w2s.folder"] == str(group / "mim")
    about = read_about(group / "clip")
    assert {f"w2s.{name}": text for name, text in about.items()}.items() <= clip.data.tags.items()
    counts = [int(count.replace(",", "")) for count in re.findall(r"[\d,]*\d", about["parameters"])]
    assert counts[0] == counts[1] + counts[2]  # vision and text


def test_the_experiment_opens_in_the_view_for_training(group: Path, client: MlflowClient) -> None:
    experiment = client.get_experiment(mlflow_run(client, group).info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_registered_clip_embeds_as_the_checkpoint_does(
    w2s: Run, group: Path, client: MlflowClient, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    (made,) = client.search_model_versions("name='shapes'")
    assert made.run_id == mlflow_run(client, group / "clip").info.run_id
    assert made.tags["w2s.checkpoint"] == mlflow_run(client, group / "clip").data.tags["w2s.checkpoint"]
    model = mlflow.pyfunc.load_model("models:/shapes/1")
    assert model.metadata.signature.inputs.input_names() == ["image", "text"]
    images = []
    for index, colour in enumerate(("red", "blue")):  # of the model's size, so that nothing is resized
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{index}.png")
        images.append((tmp_path / f"{index}.png").read_bytes())
    texts = ["a red circle", "a blue square"]
    (tmp_path / "texts").write_text("\n".join(texts))
    both = model.predict({"image": images, "text": texts})
    given = ["--images", str(tmp_path / "*.png"), "--texts", str(tmp_path / "texts"), "--out", str(tmp_path / "out")]
    code, _, error = w2s("encode", str(group / "clip"), *given, "hardware=cpu")
    assert (code, error) == (0, "")
    for kind in ("image", "text"):
        ours = torch.nn.functional.normalize(load_file(tmp_path / "out")[f"{kind}_features"], dim=-1)
        theirs = torch.tensor(both[f"{kind}_embedding"].tolist())
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)  # float32 sums in another order
    one = model.predict({"text": texts[:1]})
    assert list(one.columns) == ["text_embedding"] and len(one) == 1


def test_the_report_is_made_again_at_any_time(w2s: Run, group: Path, tmp_path: Path) -> None:
    before = (group / "report.html").read_bytes()
    code, output, error = w2s("report", group.name, "--root", str(group.parent))
    assert (code, output, error) == (0, f"report: {group / 'report.html'}\n", "")
    assert (group / "report.html").read_bytes() == before
    page = tmp_path / "page.html"
    code, output, error = w2s("report", str(group / "clip"), str(group / "scratch"), "--out", str(page))
    assert (code, output, error) == (0, f"report: {page}\n", "")
    assert "init.vision" in page.read_text(), "the setting that differs"


def test_a_repeated_pipeline_prints_its_table_and_runs_nothing(
    w2s: Run, group: Path, base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(pipeline, "launch_stage", None)
    code, output, error = w2s("run", PIPELINE, *base, "clip:tracking.register=shapes")
    assert (code, error) == (0, "")
    lines = output.splitlines()
    assert [line.split(":")[0] for line in lines if "finished before, in" in line] == list(STEPS)
    assert lines[-1] == f"report: {group / 'report.html'}"
    metrics = result(group / "eval")["metrics"]
    (row,) = [line for line in lines if line.split()[:1] == ["eval"]]
    assert f"{metrics['knn/top1']:.4f}" in row
    tops = [line for line in lines if "zero-shot top-1 " in line]
    assert len(tops) == 4, "of both clip steps and both eval steps"
    assert all("chance 0.0417" in line for line in tops)
