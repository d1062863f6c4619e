"""The loop of the stages around a stage that only counts: what is logged, saved and measured when."""

import re
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import make_student
from tests.stages.shapes import write_shapes
from w2s.checkpoint import store
from w2s.checkpoint.handover import Handover
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.batch import Batch
from w2s.data.sample import SampleSpec
from w2s.errors import StopRun, UserError, W2SError
from w2s.megatron.groups import Ranks
from w2s.megatron.optimizer import Optimizer, Towers
from w2s.tracking.history import read_history
from w2s.tracking.tracker import Tracker
from w2s.trainer import Trainer


class Counting:
    """A stage whose loss is the number of samples that it has seen."""

    def __init__(self, config: Config) -> None:
        self.towers: Towers = {"vision": make_student()}
        self.optimizer = Optimizer(self.towers, config.optim, torch.float32)
        self.spec = SampleSpec(image_size=8, grid=1)
        self.seen = 0
        self.indices: list[int] = []
        self.calls: list[str] = []
        self.wrong_at = self.stop_at = 0

    def begin(self) -> Handover | None:
        self.calls.append("begin")
        return None

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self.seen += len(batch)
        self.indices += batch.indices.tolist()
        self.calls.append("step")
        return {"loss": torch.tensor(float("nan") if self.seen == self.wrong_at else self.seen)}

    def after_update(self) -> None:
        self.calls.append("update")
        if self.calls.count("update") == self.stop_at:
            signal.raise_signal(signal.SIGTERM)

    def evaluate(self) -> dict[str, float]:
        self.calls.append("evaluate")
        return {"knn/top1": self.seen / 100}

    def finish(self, tracker: Tracker) -> dict[str, float]:
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        self.seen = int(extra["seen"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "train", shards=2, seed=0)


@pytest.fixture
def options(shards: Path, tmp_path: Path) -> list[str]:
    train = ["train.steps=7", "train.global_batch=4", "train.micro_batch=4", "train.log_every=3", "optim.warmup=2"]
    data = ["data.builtin=none", f"data.train={shards}", "data.lanes=2", "data.workers=0"]
    return ["hardware=cpu", "tracking.enabled=false", f"run.root={tmp_path}", *data, *train, "checkpoint.every=5"]


def test_what_happens_when(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", [*options, "train.eval_every=4"])
    trainer = Trainer(stage := Counting(config), config, tmp_path / "run", alone)
    trainer.train()
    assert stage.calls == ["begin", "evaluate", *["step", "update"] * 4, "evaluate", *["step", "update"] * 3]
    lines = [(line["step"], line["samples_seen"], line.get("loss")) for line in read_history(tmp_path / "run")]
    # Every third step, whenever something is saved, at the end; the evaluations at 0 and 4 have no loss.
    assert lines == [(0, 0, None), (3, 12, 12), (4, 16, None), (5, 20, 20), (6, 24, 24), (7, 28, 28)]
    names = sorted(path.name for path in store.checkpoints_of(tmp_path / "run").iterdir())
    assert names == ["latest", "step-00000005", "step-00000007"]
    assert stage.indices == list(range(28))


def test_the_learning_rate_warms_up_and_falls(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", [*options, "train.log_every=1", "optim.lr=0.1", "optim.min_lr=0", "optim.warmup=3"])
    Trainer(Counting(config), config, tmp_path / "run", alone).train()
    rates = [line["lr"] for line in read_history(tmp_path / "run") if "lr" in line]
    assert rates[:4] == pytest.approx([0.0, 0.05, 0.1, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * (1 + torch.tensor(torch.pi * 3 / 4).cos().item()) / 2)


def test_a_restored_run_goes_on_where_it_was(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", options)
    begun = Trainer(stage := Counting(config), config, tmp_path / "run", alone)
    stage.stop_at = 5
    with pytest.raises(StopRun, match="stopped by SIGTERM at step 5"):
        begun.train()
    trainer = Trainer(stage := Counting(config), config, tmp_path / "run", alone)
    assert (trainer.step, trainer.samples, stage.seen) == (5, 20, 20)
    trainer.train()
    assert stage.calls == ["step", "update"] * 2, "nothing begins and nothing is measured again"
    assert stage.indices == list(range(20, 28))


@pytest.mark.parametrize(
    ("change", "then"),
    [("run.seed=1", "run.seed=0"), ("optim.lr=0.5", "optim.lr=0.002"), ("model=tiny", "model.embed_dim=128")],
)
def test_a_run_does_not_go_on_as_another_one(
    alone: Ranks, options: list[str], tmp_path: Path, change: str, then: str
) -> None:
    config = load("mim", options)
    Trainer(Counting(config), config, tmp_path / "run", alone).train()
    other = load("mim", [*options, change])
    with pytest.raises(UserError, match=f"was begun with {re.escape(then)}.*: keep that, or choose another run.name"):
        Trainer(Counting(config), other, tmp_path / "run", alone)


def test_what_is_no_number_is_not_saved(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", options)
    trainer = Trainer(stage := Counting(config), config, tmp_path / "run", alone)
    stage.wrong_at = 20
    with pytest.raises(W2SError, match=r"loss is nan at step 5: lower optim\.lr"):
        trainer.train()
    assert store.latest(tmp_path / "run") is None
    assert read_history(tmp_path / "run")[-1]["loss"] is None
