"""The paper's pipeline: what its steps are, that they fit on its GPUs, and all of it in small."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint.peers import released
from tests.stages.shape_images import write_shapes
from w2s.checkpoint.own.checkpoint_folders import latest, read_meta
from w2s.checkpoint.weights.released import open_released
from w2s.config.checks import check
from w2s.config.load import named_model
from w2s.config.sections import Config
from w2s.launch import run_stage
from w2s.pipeline import runner
from w2s.pipeline.runner import run_pipeline
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan
from w2s.planning.hardware_file import lanes
from w2s.planning.plan import find_plans
from w2s.planning.time.cards import card

EVALUATIONS = ("classes", "retrieval", "classes_336", "retrieval_336")


@pytest.fixture(scope="module")
def steps() -> dict[str, Config]:
    configs = Plan(load_pipeline("eva_18b"), [], fresh=False).configs()
    return {config.run.name: config for config in configs}


def test_the_steps_are_the_papers(steps: dict[str, Config]) -> None:
    assert list(steps) == ["mim", "clip", "clip_336", "classes", "retrieval", "classes_336", "retrieval_336"]
    samples = {name: steps[name].train.steps * steps[name].train.global_batch for name in ("mim", "clip", "clip_336")}
    assert samples == pytest.approx({"mim": 6e9, "clip": 6e9, "clip_336": 400e6}, rel=1e-4)
    mim, clip, larger = (steps[name] for name in samples)
    assert mim.teacher.source.startswith("eva:eva02_e_plus@")
    assert clip.init.vision.endswith("/mim") and clip.init.text == "teacher"
    assert clip.teacher.source == mim.teacher.source
    assert [(phase.samples, phase.patch_dropout) for phase in clip.data.phases] == [(5_400_000_000, 0.5), (0, 0.0)]
    assert clip.data.phases[1].train == f"{clip.data.train}::shards/laion-coco/"
    assert larger.init.vision == larger.init.text and larger.init.vision.endswith("/clip")
    assert (larger.model.vision.image_size, larger.clip.patch_dropout, larger.data.phases) == (336, 0, [])
    measured = {name: (config.init.checkpoint.rpartition("/")[2], config.eval.suite) for name, config in steps.items()}
    assert list(measured.values())[3:] == [
        (clip, suite) for clip in ("clip", "clip_336") for suite in ("clip27", "retrieval")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mim", "clip", "clip_336"])
def test_every_step_fits_on_its_gpus(steps: dict[str, Config], name: str) -> None:
    gpus = 256 if name == "mim" else 360
    config = steps[name]
    plan = find_plans(config, card("h100"), gpus).fastest[0]
    # Lanes too are a hardware file's.
    data = replace(config.data, lanes=lanes(plan.config, gpus))
    check(replace(plan.config, hardware=replace(config.hardware, device="cpu"), data=data), gpus, 8)
    assert plan.config.train.global_batch == config.train.global_batch


def test_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs; the text tower is the teacher's at first, and each step begins with what the one before gave."""
    monkeypatch.setattr(
        runner, "launch_stage", lambda config, ranks, restarts: run_stage(config)
    )  # in this process: sooner
    torch.save(released(named_model("tiny")), tmp_path / "teacher.pt")
    train = write_shapes(tmp_path / "train", shards=4, seed=0)
    for name in ("wds_vtab-pets", "wds_mscoco_captions"):
        write_shapes(tmp_path / "sets" / name / "test", shards=1, seed=1)
    (tmp_path / "sets" / "wds_vtab-pets" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
    report = run_pipeline(
        "eva_18b",
        [
            f"run.root={tmp_path / 'runs'}",
            "tracking.enabled=false",
            "tracking.pictures=0",
            "hardware=cpu",
            "model=tiny",
            "clip_336:model.vision.image_size=48",
            "classes_336:model.vision.image_size=48",
            "retrieval_336:model.vision.image_size=48",
            f"teacher.source=eva:tiny@{tmp_path / 'teacher.pt'}",
            "precision.compute=fp32",
            "teacher.precision=fp32",
            f"data.train={train}",
            "data.weights=[]",
            f"clip:data.phases=[{{samples: 8, patch_dropout: 0.5}}, {{patch_dropout: 0.0, train: {train}/000000.tar}}]",
            "data.lanes=1",
            "data.workers=0",
            *(
                f"{step}:{override}"
                for step in ("mim", "clip", "clip_336")
                for override in ("train.steps=2", "train.global_batch=8", "train.micro_batch=4", "optim.warmup=1")
            ),
            *(f"{step}:eval.root={tmp_path / 'sets'}" for step in EVALUATIONS),
        ],
        ranks=1,
        fresh=False,
    )
    folder = report.parent
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}
    assert results.keys() == {"mim", "clip", "clip_336", *EVALUATIONS}
    for name in EVALUATIONS:
        wanted = "pets/zero_shot/top1" if "classes" in name else "coco/retrieval/text_to_image_recall_at_1"
        assert wanted in results[name]["metrics"]
    parents = [read_meta(newest(folder / name)).parent or "" for name in ("clip", "clip_336")]
    assert "/mim/" in parents[0] and "/clip/" in parents[1]
    # Two steps at the text tower's small rate move it hardly at all.
    key = "text.transformer.resblocks.0.attn.in_proj_weight"
    started = open_released(tmp_path / "teacher.pt").read(key)
    ended = open_released(newest(folder / "clip_336")).read(key)
    assert 0 < (ended - started).abs().max() < 0.05 * started.abs().max()


def newest(folder: Path) -> Path:
    checkpoint = latest(folder)
    assert checkpoint is not None
    return checkpoint
