"""Clips: the contrastive stage and evaluations average the features of their frames, the masked stage sees one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_files import write_shard
from tests.stages.conftest import Material
from tests.stages.runs import QUIET, history, result, run_stage
from tests.stages.shape_images import write_clips
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards

WHOLE = "clip.patch_dropout=0"
RELATIVE = 1e-5
"""Of losses: a product of twice as many rows may add its terms in another order."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips") / "train", shards=4, seed=2, frames=5)


@pytest.fixture(scope="module")
def middles(clips: Path) -> Path:
    """The middle frames of the clips, as images."""
    names = {"002.png": "png", "txt": "txt", "cls": "cls"}
    folder = clips.parent / "middles"
    folder.mkdir()
    for shard in list_shards(str(clips)):
        samples = ((each.key, {new: each.files[old] for old, new in names.items()}) for each in read_shard(shard))
        write_shard(folder / Path(shard).name, samples)
    shutil.copy(clips / "classnames.txt", folder)
    return folder


def losses(stage: str, base: list[str], train: Path, name: str, *options: str) -> list[float]:
    changes = ["init.vision=none", "train.steps=2", f"data.train={train}", f"run.name={name}"]
    run = run_stage(stage, [*base, *QUIET, *changes, *options])
    return history(run, "loss")


def test_an_image_among_clips_counts_as_it_does_among_images(base: list[str], material: Material) -> None:
    still = losses("clip", base, material.train, "still", WHOLE, "data.frames=2")
    assert still == pytest.approx(losses("clip", base, material.train, "image", WHOLE), rel=RELATIVE)


def test_the_masked_stage_learns_from_middle_frames(base: list[str], clips: Path, middles: Path) -> None:
    assert losses("mim", base, clips, "of-clips") == losses("mim", base, middles, "of-middles")


@pytest.fixture(scope="module")
def trained(base: list[str], clips: Path, material: Material) -> Path:
    """Two steps over images, then two over clips, as EVA-CLIP-18B ends; evaluated on clips."""
    phases = f"data.phases=[{{samples: 32}}, {{train: {clips}, frames: 3, patch_dropout: 0.25}}]"
    options = ["init.vision=none", phases, "data.frames=2", f"eval.shards={clips}", "run.name=phases"]
    return run_stage("clip", [*base, *options, "tracking.enabled=false", f"eval.knn_shards={clips}"])


def evaluated(base: list[str], checkpoint: Path, shards: Path, name: str, *options: str) -> dict[str, Any]:
    settings = [f"init.checkpoint={checkpoint}", f"eval.shards={shards}", f"run.name={name}", "eval.baselines=false"]
    run = run_stage("eval", [*base, "tracking.enabled=false", "tracking.pictures=1", *settings, *options])
    metrics: dict[str, Any] = result(run)["metrics"]
    return metrics


def test_a_run_over_images_and_clips_is_evaluated_on_clips(
    base: list[str], trained: Path, clips: Path, middles: Path, material: Material
) -> None:
    assert len(history(trained, "loss")) == 4
    names = {"zero_shot/top1", "retrieval/mean_recall_at_10", "knn/top1"}
    two, one = (evaluated(base, trained, clips, f"frames-{n}", f"data.frames={n}") for n in (2, 1))
    assert names <= two.keys()
    assert two != one
    assert one == evaluated(base, trained, middles, "one-of-middles")
    # Images are seen once whatever the frames of a clip are.
    images = [evaluated(base, trained, material.test, f"images-{n}", f"data.frames={n}") for n in (1, 4)]
    assert images[0] == images[1]
