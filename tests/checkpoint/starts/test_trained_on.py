"""A CLIP goes to a peer, is trained on there, and comes back: our contrastive stage continues from that."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.export.test_coming_back import as_released
from tests.checkpoint.ours import assert_holds
from tests.stages.runs import QUIET, history, run_stage
from tests.stages.shape_images import write_shapes
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.find import find_any
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.released import rename
from w2s.checkpoint.weights.tensor_files import InMemory
from w2s.config.load import named_model

pytestmark = pytest.mark.slow

Trained = tuple[Path, dict[str, Tensor]]
"""What a peer has saved, and the weights that it has left, under the released names."""


def by_open_clip_train(exported: Path, folder: Path) -> Trained:
    command = [sys.executable, "-m", "open_clip_train.main", "--model", "local-dir:.", "--dataset-type", "synthetic"]
    command += ["--train-num-samples", "8", "--batch-size", "4", "--epochs", "1", "--lr", "1e-3", "--warmup", "1"]
    command += ["--workers", "0", "--precision", "fp32", "--logs", str(folder), "--name", "tuned"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=exported, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    saved = folder / "tuned" / "checkpoints" / "epoch_1.pt"
    return saved, as_released(torch.load(saved, weights_only=True)["state_dict"])


def by_trainer(exported: Path, folder: Path) -> Trained:
    """Hugging Face's Trainer, on the whole CLIP."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason="an optional package: pip install 'transformers[torch]'")
    from transformers import AutoModel, Trainer, TrainingArguments

    clip, before = AutoModel.from_pretrained(exported), AutoModel.from_pretrained(exported).state_dict()
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 32, 32, generator=generator), torch.tensor([49406, word, 49407])) for word in range(8)]

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor | bool]:
        pixels, tokens = (torch.stack(each) for each in zip(*rows, strict=True))
        return {"pixel_values": pixels, "input_ids": tokens, "return_loss": True}

    settings = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=8, learning_rate=1e-3, save_steps=1,
        report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=clip, args=settings, train_dataset=pairs, data_collator=collate).train()
    after = clip.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    left = rename(InMemory(after), folder)
    names = [name for name in left.meta if name != "visual.head.bias"]  # zeros, where our model has none
    return folder / "checkpoint-1", {name: left.read(name) for name in names}


@pytest.mark.parametrize(("format", "peer"), [("open_clip", by_open_clip_train), ("transformers", by_trainer)])
def test_a_peer_trains_an_export_and_we_continue(
    tmp_path: Path, format: str, peer: Callable[[Path, Path], Trained]
) -> None:
    shards = write_shapes(tmp_path / "train", shards=8, seed=0)
    options = ["model=tiny", "hardware=cpu", "data.builtin=none", f"data.train={shards}", "data.workers=0", *QUIET]
    options += [f"run.root={tmp_path / 'runs'}", "train.global_batch=24", "train.micro_batch=24", "train.log_every=1"]
    options += ["optim.warmup=1"]
    run = run_stage("clip", [*options, "run.name=first", "init.vision=none", "train.steps=4"])
    export_checkpoint(find_any(str(run), tmp_path, key="RUN"), format, tmp_path / "exported")
    moved = (tmp_path / "exported").rename(tmp_path / "moved")
    run.rename(tmp_path / "gone")
    (tmp_path / "peer").mkdir()
    saved, weights = peer(moved, tmp_path / "peer")
    import_checkpoint(saved, named_model(str(moved / "model.yaml")), tmp_path / "runs" / "tuned")
    assert_holds(tmp_path / "runs" / "tuned", weights)
    again = run_stage("clip", [*options, "run.name=again", "init.vision=tuned", "init.text=tuned", "train.steps=2"])
    assert len(history(again, "loss")) == 2
