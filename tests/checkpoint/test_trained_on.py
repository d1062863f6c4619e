"""A CLIP goes to open_clip_train and comes back: its own command trains the export, and our stage goes on from that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoint.ours import assert_holds
from tests.checkpoint.test_coming_back import as_released
from tests.stages.runs import QUIET, history, run_stage
from tests.stages.shapes import write_shapes
from w2s.checkpoint.exporting import export_checkpoint
from w2s.checkpoint.find import find_any
from w2s.checkpoint.importing import import_checkpoint
from w2s.config.load import named_model

pytestmark = pytest.mark.slow


def test_open_clip_train_trains_an_export_and_we_go_on(tmp_path: Path) -> None:
    train = write_shapes(tmp_path / "train", shards=8, seed=0)
    options = ["model=tiny", "hardware=cpu", "data.builtin=none", f"data.train={train}", "data.workers=0", *QUIET]
    options += [f"run.root={tmp_path / 'runs'}", "train.global_batch=24", "train.micro_batch=24", "train.log_every=1"]
    options += ["optim.warmup=1"]
    run = run_stage("clip", [*options, "run.name=first", "init.vision=none", "train.steps=4"])
    export_checkpoint(find_any(str(run), tmp_path, key="RUN"), "open_clip", tmp_path / "exported")
    moved = (tmp_path / "exported").rename(tmp_path / "moved")
    run.rename(tmp_path / "gone")
    command = [sys.executable, "-m", "open_clip_train.main", "--model", "local-dir:.", "--dataset-type", "synthetic"]
    command += ["--train-num-samples", "8", "--batch-size", "4", "--epochs", "1", "--lr", "1e-3", "--warmup", "1"]
    command += ["--workers", "0", "--precision", "fp32", "--logs", str(tmp_path / "logs"), "--name", "tuned"]
    done = subprocess.run(command, cwd=moved, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    saved = tmp_path / "logs" / "tuned" / "checkpoints" / "epoch_1.pt"
    import_checkpoint(saved, named_model(str(moved / "model.yaml")), tmp_path / "runs" / "tuned")
    weights = torch.load(saved, weights_only=True)["state_dict"]
    assert_holds(tmp_path / "runs" / "tuned", as_released(weights))
    again = run_stage("clip", [*options, "run.name=again", "init.vision=tuned", "init.text=tuned", "train.steps=2"])
    assert len(history(again, "loss")) == 2
