"""From mim to clip to eval: what each stage starts from, and what it says of it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.stages.runs import QUIET, result, run_stage
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
