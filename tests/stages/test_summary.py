"""A student that is handed all that its teacher knows: a CLIP before it has seen one pair."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.peers import released
from tests.stages.conftest import Material, Refused
from tests.stages.runs import history, records, result, run_stage
from w2s.checkpoint.own.checkpoint_folders import latest, read_meta
from w2s.checkpoint.weights.tensor_files import open_weights
from w2s.config.load import load

EVERY = ["train.eval_every=4", "eval.knn_shards=", "tracking.enabled=false", "tracking.pictures=0"]
STUDENT = ["model.vision.layers=3", "teacher.source=w2s:weak"]


@dataclass(frozen=True)
class Chain:
    """A small CLIP, a student of its with a summary target, and the student's contrastive stage."""

    weak: Path
    mim: Path
    clip: Path


@pytest.fixture(scope="module")
def chain(base: list[str]) -> Chain:
    common = [*base, *EVERY, "teacher.image_size=0"]
    return Chain(
        weak=run_stage("clip", [*common, "init.vision=none", "run.name=weak"]),
        mim=run_stage("mim", [*common, *STUDENT, "mim.summary_weight=1", "run.name=student"]),
        clip=run_stage("clip", [*common, *STUDENT[:1], "init.vision=student", "init.text=teacher", "run.name=clip"]),
    )


def shared(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(("zero_shot/", "retrieval/"))}


def test_the_student_is_measured_as_a_clip_beside_its_teacher(chain: Chain) -> None:
    metrics = result(chain.mim)["metrics"]
    ours, weak = shared(metrics), shared(result(chain.weak)["metrics"])
    assert ours.keys() == weak.keys() and "retrieval/image_to_text_recall_at_1" in ours
    # The same tower in timm's and open_clip's modules: rankings are those of its own evaluation.
    assert {name: metrics[f"teacher/{name}"] for name in weak} == pytest.approx(weak, abs=1e-4)
    assert ours != pytest.approx(weak, abs=1e-4)


def test_the_contrastive_stage_begins_as_that_clip(chain: Chain) -> None:
    first = next(record for record in records(chain.clip) if record["step"] == 0)
    # Its text tower is Megatron's, the masked stage's open_clip's: sums in another order.
    assert shared(first) == pytest.approx(shared(result(chain.mim)["metrics"]), abs=1e-4)


def test_the_table_says_what_was_taken(chain: Chain) -> None:
    checkpoint = latest(chain.clip)
    assert checkpoint is not None
    parent = read_meta(checkpoint).parent
    assert parent == f"{latest(chain.mim)} and {latest(chain.weak)}"
    table = json.loads((chain.clip / "tables" / "handover.json").read_text())
    rows = {row[0]: row[2] for row in table["rows"]}
    assert table["title"] == f"taken from {parent}"
    assert "vision.head.weight" in rows["loaded"]
    assert "text.logit_scale" in rows["loaded"] and "text.text_projection" in rows["loaded"]
    assert rows["dropped"] == "vision.lm_head.bias, vision.lm_head.weight, vision.mask_token"
    assert rows["new"] == ""


def test_fresh_projections_stay_behind(chain: Chain, base: list[str]) -> None:
    fresh = ["init.projections=fresh", "train.steps=2", "run.name=fresh"]
    run = run_stage("clip", [*base, *EVERY, *STUDENT, "init.vision=student", "init.text=teacher", *fresh])
    table = json.loads((run / "tables" / "handover.json").read_text())
    assert table["rows"][-1][2] == "vision.head.weight, text.logit_scale, text.text_projection"


def test_a_scale_that_is_set_is_kept_beside_the_teachers_text_tower(chain: Chain, base: list[str]) -> None:
    constant = ["clip.learn_logit_scale=false", "clip.logit_scale=100", "train.steps=2", "run.name=constant"]
    run = run_stage("clip", [*base, *EVERY, *STUDENT[:1], "init.vision=student", "init.text=teacher", *constant])
    assert history(run, "logit_scale") == pytest.approx([100, 100])
    assert history(chain.clip, "logit_scale")[0] == pytest.approx(history(chain.weak, "logit_scale")[-1], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["init.vision=none", "teacher.source=efficientnet_lite0"],
            "init.text=teacher: teacher.source=efficientnet_lite0 has no text tower: use a CLIP",
        ),
        (["init.vision=none", "teacher.source=w2s:student"], "teacher.source=w2s:student has no text tower"),
        (["init.vision=none", "teacher.source=eva:eva_s"], "the weights of teacher.source=eva:eva_s are random"),
        (["init.vision=student", "model.text.heads=1"], "has 2 heads, use model.text.heads=2"),
    ],
)
def test_a_teacher_without_a_fitting_text_tower_is_refused(
    chain: Chain, base: list[str], refused: Refused, options: list[str], line: str
) -> None:
    changes = [*base, *EVERY, *STUDENT[:1], "init.text=teacher", "run.name=refused", *options]
    error = refused("stage", "clip", *changes)
    assert line in error


@pytest.mark.parametrize("kind", ["eva", "open_clip"])
def test_the_text_tower_of_other_peoples_files(base: list[str], tmp_path: Path, material: Material, kind: str) -> None:
    """A released file of the tiny model, as EVA-CLIP names its tensors and as open_clip and OpenAI do."""
    model = load("clip", base).model
    tensors = released(model)
    if kind == "open_clip":
        plain = {name.removeprefix("text."): value for name, value in tensors.items() if not name.startswith("visual.")}
        tensors = {**plain, "visual.conv1.weight": torch.zeros(4, 3, 8, 8)}
    save_file(tensors, tmp_path / "clip.safetensors")
    source = f"timm:any@{tmp_path / 'clip.safetensors'}"
    heads = [f"model.text.heads={max(1, model.text.width // 64)}"]  # as in every released CLIP
    changes = ["init.vision=none", "init.text=teacher", f"teacher.source={source}", "train.steps=2", f"run.name={kind}"]
    run = run_stage("clip", [*base, *EVERY, *heads, *changes])
    table = json.loads((run / "tables" / "handover.json").read_text())
    assert table["title"] == f"taken from {tmp_path / 'clip.safetensors'}"
    count = sum(name.startswith("text.") or name == "logit_scale" for name in released(model))
    assert table["rows"][0][:2] == ["loaded", str(count)]
    assert open_weights(tmp_path / "clip.safetensors").meta.keys() == tensors.keys()
