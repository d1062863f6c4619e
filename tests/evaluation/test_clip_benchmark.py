"""Our metrics beside those of CLIP_benchmark's own command, on an exported CLIP and the same test sets.

The command is that of W2S_CLIP_BENCHMARK, or the one on the PATH. It comes with `pip install clip-benchmark` and, as it
takes arrays of one element for numbers, 'numpy<2.4', best into an environment of its own.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.stages.runs import result, run_stage
from tests.stages.shape_images import NAMES, draw_shapes, write_shapes
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.find import find_any
from w2s.data.making.clip_benchmark import BenchmarkSet
from w2s.data.making.items import find_items
from w2s.data.making.make import make_shards

COMMAND = os.environ.get("W2S_CLIP_BENCHMARK") or shutil.which("clip_benchmark")
ROUNDS = 60
"""Times that each of 24 shapes is drawn."""
CAPTIONED = 10
"""Those whose pictures have captions: of few pictures more are found."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMMAND is None, reason="there is no clip_benchmark command, see W2S_CLIP_BENCHMARK"),
]

SUITE = """
title: Shapes
sets:
  - {name: classes}
  - {name: several, metric: mean_average_precision}
  - {name: captions, metric: recall}
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 48 pixels with a class, with several, and with five captions that no other picture has."""
    pictures, root = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("sets")
    captions, classes = ["image,caption"], ["image,class"]
    for index, shard in enumerate(draw_shapes(ROUNDS, seed=7)):
        for label, image in shard:
            colour, shape = NAMES[label].split()[1:]
            place = f"{NAMES[label]}/{index}.png"
            (pictures / place).parent.mkdir(exist_ok=True)
            (pictures / place).write_bytes(image)
            words = (f"a {colour} {shape}", f"{shape}, {colour}", f"the {colour} one", f"{index}: {shape}", colour)
            captions += [] if index >= CAPTIONED else [f'{place},"{text} {label} of {index}"' for text in words]
            classes += [f"{place},{colour}", f"{place},{shape}"]
    (pictures / "captions.csv").write_text("\n".join(captions))
    (pictures / "classes.csv").write_text("\n".join(classes))
    prompts = ["a photo of {c}.", "{c}"]
    for name, source in (
        ("classes", pictures),
        ("captions", pictures / "captions.csv"),
        ("several", pictures / "classes.csv"),
    ):
        test_set = BenchmarkSet(split="test", prompts=prompts)
        make_shards(find_items(source), root / name, shard_size=500, seed=0, workers=1, test_set=test_set)
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP that has learnt a little."""
    folder = tmp_path_factory.mktemp("clip")
    train = write_shapes(folder / "train", shards=8, seed=0)
    options = ["model=tiny", "hardware=cpu", "data.builtin=none", f"data.train={train}", "data.workers=0"]
    options += ["eval.shards=", "tracking.enabled=false", "init.vision=none", f"run.root={folder}", "run.name=clip"]
    options += ["train.steps=150", "train.global_batch=96", "train.micro_batch=96", "clip.patch_dropout=0"]
    return run_stage("clip", [*options, "optim.lr=5e-3", "optim.warmup=10", "train.eval_every=0"])


def of_benchmark(model: Path, folder: Path, name: str, task: str, out: Path) -> dict[str, float]:
    arguments = ["eval", "--model", "local-dir:.", "--pretrained", "", "--dataset", f"wds/{name}"]
    arguments += ["--dataset_root", str(folder / name), "--task", task, "--no_amp", "--num_workers", "0"]
    arguments += ["--recall_k", "1", "5", "10", "--batch_size", "64", "--output", str(out)]
    command: Sequence[str] = [str(COMMAND), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=model)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found["metrics"]


def test_every_metric_agrees_with_clip_benchmarks(clip: Path, sets: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(SUITE)
    options = ["hardware=cpu", "data.builtin=none", "data.workers=0", f"init.checkpoint={clip}", "eval.shards="]
    options += ["eval.knn_shards=", f"run.root={tmp_path}", "run.name=eval", "tracking.enabled=false"]
    run = run_stage("eval", [*options, f"eval.suite={tmp_path / 'shapes.yaml'}", f"eval.root={sets}"])
    ours = result(run)["metrics"]
    export_checkpoint(find_any(str(clip), clip.parent, key="RUN"), "open_clip", tmp_path / "exported")
    moved = (tmp_path / "exported").rename(tmp_path / "moved")

    def theirs(name: str, task: str) -> dict[str, float]:
        return of_benchmark(moved, sets, name, task, tmp_path / f"{name}.json")

    classes = theirs("classes", "zeroshot_classification")
    several = theirs("several", "zeroshot_classification")
    captions = theirs("captions", "zeroshot_retrieval")
    pairs = {
        "classes/zero_shot/top1": classes["acc1"],
        "classes/zero_shot/top5": classes["acc5"],
        "classes/zero_shot/mean_per_class": classes["mean_per_class_recall"],
        "several/zero_shot/mean_average_precision": several["mean_average_precision"],
    }
    for k in (1, 5, 10):
        pairs[f"captions/retrieval/image_to_text_recall_at_{k}"] = captions[f"text_retrieval_recall@{k}"]
        pairs[f"captions/retrieval/text_to_image_recall_at_{k}"] = captions[f"image_retrieval_recall@{k}"]
    print(json.dumps({name: [ours[name], value] for name, value in pairs.items()}, indent=1))
    # A tenth of a point is 1.4 of the 1,440 pictures with classes; of the 240 with captions none may differ.
    # Pixels differ by a level in a few places (Pillow's rounding), which moves cosines by 1e-4.
    assert {name: ours[name] for name in pairs} == pytest.approx(pairs, abs=0.001)
    assert ours["classes/zero_shot/chance_top1"] * 3 < ours["classes/zero_shot/top1"] < 1
