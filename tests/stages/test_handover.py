"""From mim to clip to eval: what each stage starts from, and what it says of it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from tests.stages.conftest import Run
from tests.stages.runs import QUIET, history, result, run_stage
from w2s.checkpoint.own.checkpoint_folders import latest, read_meta


@dataclass(frozen=True)
class Chain:
    """Two masked runs, and a clip and an eval run with nothing said of where they start."""

    older: Path
    newer: Path
    clip: Path
    eval: Path


@pytest.fixture(scope="module")
def chain(base: list[str]) -> Chain:
    return Chain(
        older=run_stage("mim", [*base, *QUIET, "run.name=older"]),
        newer=run_stage("mim", [*base, "eval.shards=", "eval.knn_shards=", "run.name=newer", "run.seed=1"]),
        clip=run_stage("clip", [*base, "run.name=clip"]),
        eval=run_stage("eval", [*base, "run.name=eval"]),
    )


def parent(run: Path) -> str | None:
    checkpoint = latest(run)
    assert checkpoint is not None
    return read_meta(checkpoint).parent


def test_clip_starts_from_the_newest_finished_masked_run(chain: Chain) -> None:
    assert parent(chain.clip) == str(chain.newer / "checkpoints" / "step-00000004")
    table = json.loads((chain.clip / "tables" / "handover.json").read_text())
    assert table["title"] == f"taken from {parent(chain.clip)}"
    assert [row[:2] for row in table["rows"]] == [["loaded", "23"], ["dropped", "3"], ["new", "1"]]
    assert [row[2] for row in table["rows"][1:]] == [
        "vision.lm_head.bias, vision.lm_head.weight, vision.mask_token",
        "vision.head.weight",
    ]


def test_eval_measures_what_clip_measured_at_its_end(chain: Chain) -> None:
    clip, measured = result(chain.clip), result(chain.eval)
    assert (clip["stage"], measured["stage"]) == ("clip", "eval")
    shared = {name for name in clip["metrics"] if name.startswith(("zero_shot/", "retrieval/"))}
    assert len(shared) == 14
    assert {name: measured["metrics"][name] for name in shared} == {name: clip["metrics"][name] for name in shared}
    assert measured["metrics"]["zero_shot/chance_top1"] == pytest.approx(1 / 24)
    assert {"knn/top1", "knn_random/top1", "knn_teacher/top1"} <= measured["metrics"].keys()
    assert measured["seconds"] > 0
    assert 0.05 < measured["peak_memory_gib"] < 100


def test_mlflow_knows_the_parents(chain: Chain, client: MlflowClient) -> None:
    for run, origin in ((chain.clip, chain.newer), (chain.eval, chain.clip)):
        tags = client.get_run((run / "mlflow_run_id").read_text().strip()).data.tags
        assert tags["w2s.parent_checkpoint"] == str(origin / "checkpoints" / "step-00000004")
        assert (tags["w2s.stage"], tags[MLFLOW_RUN_NAME]) == (run.name, run.name)


@pytest.mark.slow
def test_a_start_by_path_by_name_and_by_mlflow_id(chain: Chain, base: list[str]) -> None:
    mlflow_id = (chain.newer / "mlflow_run_id").read_text().strip()
    origins = {
        "path": (str(chain.older), chain.older),
        "checkpoint": (str(chain.older / "checkpoints" / "step-00000004"), chain.older),
        "name": ("older", chain.older),
        "id": (mlflow_id, chain.newer),
        "none": ("none", None),
    }
    first_losses = {}
    for kind, (init, origin) in origins.items():
        run = run_stage("clip", [*base, *QUIET, f"run.name=by-{kind}", f"init.vision={init}", "train.steps=2"])
        assert parent(run) == (str(origin / "checkpoints" / "step-00000004") if origin else None)
        assert (run / "tables" / "handover.json").exists() == (origin is not None)
        first_losses[kind] = history(run, "loss")[0]
    assert first_losses["path"] == first_losses["checkpoint"] == first_losses["name"]
    assert len(set(first_losses.values())) == 3


@pytest.mark.parametrize("stage", ["clip", "mim"])
def test_a_finished_tower_grows(chain: Chain, base: list[str], stage: str, tmp_path: Path) -> None:
    wider = ["width=64", "heads=4", "mlp_width=128", "layers=3"]
    options = [*base, *QUIET, "train.steps=2", *(f"model.vision.{change}" for change in wider)]
    options += [f"init.text={chain.clip}"] if stage == "clip" else []
    grown = [f"init.vision={chain.clip}", "init.grow=interleave", "init.grow_width=split", f"run.root={tmp_path}"]
    run = run_stage(stage, [*options, *grown])
    assert parent(run) == str(chain.clip / "checkpoints" / "step-00000004")
    table = json.loads((run / "tables" / "handover.json").read_text())
    assert table["rows"][1][0] == "grown"
    assert "vision.patch_embed.weight" in table["rows"][1][2]
    assert not any("vision." in row[2] for row in table["rows"] if row[0] == "loaded")


@pytest.mark.parametrize(
    ("stage", "override", "line"),
    [
        (
            "clip",
            "model.vision.width=64",
            "is of another model (model=tiny): vision.blocks.layers.0.mlp.linear_fc1.weight is [64, 32] there and "
            "[64, 64] here; use model=tiny or another checkpoint",
        ),
        ("clip", "model.vision.layers=3", "is of another model (model=tiny): it has no vision.blocks.layers.2."),
        (
            "clip",
            "model.vision.layers=1",
            "is of another model (model=tiny): this model has no vision.blocks.layers.1.",
        ),
        ("eval", "init.checkpoint=newer", "is of another model (model=tiny): it has no text."),
    ],
)
def test_what_does_not_fit_is_one_line(
    w2s: Run, chain: Chain, base: list[str], stage: str, override: str, line: str
) -> None:
    code, _, error = w2s("stage", stage, *base, "tracking.enabled=false", "run.name=misfit", override)
    assert (code, error.count("\n")) == (2, 1)
    assert line in error


def test_clip_without_a_masked_run_says_what_to_do(w2s: Run, base: list[str], tmp_path: Path) -> None:
    code, _, error = w2s("stage", "clip", *base, f"run.root={tmp_path}")
    assert (code, error.count("\n")) == (2, 1)
    assert "there is no finished mim run" in error
    assert "init.vision=none" in error
