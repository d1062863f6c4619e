import json
from dataclasses import asdict
from pathlib import Path

import pytest

from w2s.config.load import load
from w2s.config.naming import difference, digest, run_folder


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "train.steps=7",
        "train.global_batch=32",
        "optim.lr=0.5",
        "optim.vision_lr=0.5",
        "model=eva_s",
        "data.train=/elsewhere",
        "data.crop_scale=[0.3,1.0]",
        "precision.compute=bf16",
        "init.vision=/a/run",
        "eval.knn_k=3",
        "teacher.target_norm=none",
    ],
)
def test_what_changes_the_result_changes_the_digest(override: str) -> None:
    assert digest(load("mim", [override])) != digest(load("mim"))


@pytest.mark.parametrize(
    "override",
    [
        "run.root=/elsewhere",
        "run.name=mine",
        "run.group=g",
        "data.cache=/elsewhere",
        "data.workers=5",
        "train.micro_batch=8",
        "train.log_every=1",
        "checkpoint.every=3",
        "tracking.enabled=false",
        "hardware=cpu",
        "clip.tile=8",
    ],
)
def test_what_does_not_change_the_result_keeps_it(override: str) -> None:
    assert digest(load("mim", [override])) == digest(load("mim"))


def test_the_digest_is_eight_hexadecimal_digits_and_differs_by_stage() -> None:
    values = {digest(load(stage)) for stage in ("mim", "clip", "eval")}
    assert len(values) == 3
    assert all(len(value) == 8 and int(value, 16) >= 0 for value in values)


def test_folder_of_a_run() -> None:
    config = load("mim", ["run.root=/r"])
    assert run_folder(config) == Path(f"/r/mim-demo-{digest(config)}")
    assert run_folder(load("mim", ["run.root=/r", "run.name=mine"])) == Path("/r/mine")
    assert run_folder(load("mim", ["run.root=/r", "run.name=mine", "run.group=g"])) == Path("/r/g/mine")


def test_the_first_difference_that_matters() -> None:
    config = load("mim", ["optim.lr=1e-3", "hardware=cpu"])
    saved = json.loads(json.dumps(asdict(config)))
    assert difference(config, saved) is None
    assert difference(load("mim", ["optim.lr=1e-3", "train.micro_batch=8", "run.root=elsewhere"]), saved) is None
    assert difference(load("mim", ["optim.lr=2e-3"]), saved) == ("optim.lr", 1e-3, 2e-3)
    assert difference(load("mim", ["optim.lr=1e-3", "optim.ema=0.999"]), saved) is None, "it is kept beside the weights"
