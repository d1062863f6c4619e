"""The loop of the stages around a stage that only counts: what is logged, saved and measured when."""

import errno
import os
import re
import signal
from collections.abc import Container, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tests.megatron.spawn import make_student
from tests.running import running_after
from tests.stages.runs import after_each_update
from tests.stages.shape_images import write_shapes
from tests.training.loops import start_run
from w2s.checkpoint.own import checkpoint_folders
from w2s.checkpoint.starts.handover import Handover
from w2s.config.load import load
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec
from w2s.errors import CheckpointError, StopRun, UserError, W2SError
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.replicas import Divergence
from w2s.processes.liveness.heartbeat import WRITER
from w2s.run import tracked
from w2s.tracking.history import read_history
from w2s.tracking.tracker import Tracker
from w2s.training.callbacks import Callback, Training
from w2s.training.loop import train


class Counting:
    """A stage whose loss is the number of samples that it has seen."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.ranks = ranks
        self.towers: Towers = {"vision": make_student()}
        self.optimizer = Optimizer(self.towers, config.optim, torch.float32)
        self.after_update = self.count_update
        after_each_update(self.optimizer, lambda: self.after_update())
        self.spec = SampleSpec(image_size=8, grid=1)
        self.seen = 0
        self.indices: list[int] = []
        self.calls: list[str] = []
        self.wrong: range = range(0)
        self.stop_at = 0
        self.passing: Container[int] = ()

    def begin(self) -> Handover | None:
        self.calls.append("begin")
        return None

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self.seen += len(batch)
        self.indices += batch.indices.tolist()
        self.calls.append("step")
        if self.calls.count("step") in self.passing:
            return {"loss": torch.tensor(float("nan"))}
        # By the data that were seen, as it is for a bad sample: to roll back and continue brings others.
        return {"loss": torch.tensor(float("nan") if max(self.indices) in self.wrong else float(self.seen))}

    def count_update(self) -> None:
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
    steps = ["train.steps=7", "train.global_batch=4", "train.micro_batch=4", "train.log_every=3", "optim.warmup=2"]
    data = ["data.builtin=none", f"data.train={shards}", "data.lanes=2", "data.workers=0"]
    return ["hardware=cpu", "tracking.enabled=false", f"run.root={tmp_path}", *data, *steps, "checkpoint.every=5"]


def test_what_happens_when(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", [*options, "train.eval_every=4"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    train(run)
    assert stage.calls == ["begin", "evaluate", *["step", "update"] * 4, "evaluate", *["step", "update"] * 3]
    lines = [(line["step"], line["samples_seen"], line.get("loss")) for line in read_history(tmp_path / "run")]
    # Every third step, whenever something is saved, at the end; the evaluations at 0 and 4 have no loss.
    assert lines == [(0, 0, None), (3, 12, 12), (4, 16, None), (5, 20, 20), (6, 24, 24), (7, 28, 28)]
    names = sorted(path.name for path in checkpoint_folders.checkpoints_of(tmp_path / "run").iterdir())
    assert names == ["latest", "step-00000005", "step-00000007"]
    assert stage.indices == list(range(28))


class Following(Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def begin(self, training: Training) -> None:
        self.told.append(("begin", training.folder.name, *training.towers))

    def before_step(self, step: int) -> None:
        self.told.append(("before", step))

    def after_step(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        self.told.append(("after", step, metrics["loss"].item()))

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("logged", step, metrics["loss"]))

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("evaluated", step, metrics["knn/top1"]))

    def saved(self, step: int, checkpoint: Path) -> None:
        self.told.append(("saved", step, checkpoint_folders.read_meta(checkpoint).step))

    def end(self) -> None:
        self.told.append(("end",))


def test_callbacks_follow_the_loop(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", [*options, "train.steps=2", "train.log_every=2", "checkpoint.async_save=false"])
    following = Following()
    train(start_run(Counting(config, alone), config, tmp_path / "run", alone, callbacks=[Callback(), following]))
    assert following.told == [
        ("begin", "run", "vision"),
        ("evaluated", 0, 0.0),
        *[("before", 1), ("after", 1, 4.0), ("before", 2), ("after", 2, 8.0), ("logged", 2, 8.0)],
        ("saved", 2, 2),
        ("end",),
    ]


def test_callbacks_hear_of_an_early_end(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config, following = load("mim", options), Following()
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone, callbacks=[following])
    stage.stop_at = 1
    with pytest.raises(StopRun):
        train(run)
    assert following.told[-2:] == [("saved", 1, 1), ("end",)]


def test_the_learning_rate_warms_up_and_falls(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", [*options, "train.log_every=1", "optim.lr=0.1", "optim.min_lr=0", "optim.warmup=3"])
    train(start_run(Counting(config, alone), config, tmp_path / "run", alone))
    rates = [line["lr"] for line in read_history(tmp_path / "run") if "lr" in line]
    assert rates[:4] == pytest.approx([0.0, 0.05, 0.1, 0.1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.1 * (1 + torch.tensor(torch.pi * 3 / 4).cos().item()) / 2)


def test_a_restored_run_resumes_where_it_was(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", options)
    begun = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.stop_at = 5
    with pytest.raises(StopRun, match="stopped by SIGTERM at step 5"):
        train(begun)
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    assert (run.step, run.samples, stage.seen) == (5, 20, 20)
    train(run)
    assert stage.calls == ["step", "update"] * 2, "nothing begins and nothing is measured again"
    assert stage.indices == list(range(20, 28))


@pytest.mark.parametrize(
    ("change", "then"),
    [("run.seed=1", "run.seed=0"), ("optim.lr=0.5", "optim.lr=0.002"), ("model=tiny", "model.embed_dim=128")],
)
def test_a_run_does_not_resume_as_another_one(
    alone: Ranks, options: list[str], tmp_path: Path, change: str, then: str
) -> None:
    config = load("mim", options)
    train(start_run(Counting(config, alone), config, tmp_path / "run", alone))
    other = load("mim", [*options, change])
    with pytest.raises(UserError, match=f"was begun with {re.escape(then)}.*: keep that, or choose another run.name"):
        start_run(Counting(config, alone), other, tmp_path / "run", alone)


def test_a_bad_step_is_skipped_counted_and_not_saved(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", options)
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.wrong = range(16, 20)  # the samples of step 5, after which a checkpoint is due
    train(run)
    lines = read_history(tmp_path / "run")
    assert [(line["step"], line["loss"], line.get("skipped_steps")) for line in lines[1:]] == [
        (3, 12, None),
        (5, None, 1),
        (6, 24, 1),
        (7, 28, 1),
    ]
    assert sorted(path.name for path in checkpoint_folders.checkpoints_of(tmp_path / "run").iterdir()) == [
        "latest",
        "step-00000007",
    ]
    again = start_run(Counting(config, alone), config, tmp_path / "run", alone)
    assert (int(again.stage.optimizer.guard.skipped), again.step) == (1, 7)


def test_a_fault_that_has_passed_costs_nothing(
    alone: Ranks, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step is taken with the same samples, and all is as if nothing had been."""
    config = load("mim", [*options, "train.log_every=1"])
    ends = []
    for fault in (True, False):
        run = start_run(stage := Counting(config, alone), config, tmp_path / f"run-{fault}", alone)
        stage.passing = (2,) if fault else ()
        train(run)
        lines = [
            (line["step"], line["loss"], line["grad_norm"], line["lr"])
            for line in read_history(run.folder)
            if line["step"]
        ]
        ends.append((lines, stage.seen, int(stage.optimizer.guard.skipped), stage.optimizer.updates))
    assert ends[0] == ends[1]
    assert len(ends[0][0]) == 7
    out = " ".join(capsys.readouterr().out.split())
    assert "step 2 was skipped; repeated, it is not reproducible" in out and "the step is taken again" in out
    assert read_history(tmp_path / "run-True")[2]["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("bad", "says"),
    [((4,), "step 5, it is not reproducible"), ((4, 6), "step 5, it is reproducible, and there is no other")],
)
def test_a_step_that_was_skipped_between_two_lines_is_repeated_at_the_next(
    alone: Ranks, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: tuple[int], says: str
) -> None:
    """The sixth call is the repetition. The weights have moved on: the step is not taken again."""
    config = load("mim", options)
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.passing = bad
    train(run)
    out = " ".join(capsys.readouterr().out.split())
    assert f"step 4 was skipped; repeated at {says}" in out and "taken again" not in out
    assert stage.indices == [*range(20), *range(12, 16), *range(20, 28)]
    skipped = [(line["step"], line.get("skipped_steps")) for line in read_history(tmp_path / "run") if line["step"]]
    assert skipped == [(3, None), (5, 1), (6, 1), (7, 1)]


def test_a_step_that_is_bad_again_is_counted_once(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", [*options, "train.log_every=1"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.passing = (2, 4)  # the step and, after its repetition, the step again
    train(run)
    lines = read_history(tmp_path / "run")
    assert [line.get("skipped_steps") for line in lines if line["step"]] == [None, *[1] * 6]
    assert int(stage.optimizer.guard.skipped) == 1


def test_a_run_goes_back_and_passes_over_the_samples_that_led_there(
    alone: Ranks, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load("mim", [*options, "train.bad_steps=2", "checkpoint.every=3"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.wrong = range(16, 24)  # steps 5 and 6
    train(run)
    out = " ".join(capsys.readouterr().out.split())
    assert "step 6 was skipped; repeated, it is reproducible, and there is no other data-parallel rank" in out
    assert "rolled back to step 3, the samples of steps 4 to 6 are skipped" in out
    assert stage.indices == [*range(24), *range(20, 40)], "ten steps of samples for seven, the sixth repeated once"
    lines = read_history(tmp_path / "run")
    assert [(line["step"], line["loss"], line.get("skipped_steps")) for line in lines[1:]] == [
        (3, 12, None),
        (6, 24, 2),
        (7, 28, 2),
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("train.rollbacks=1", "the run has rolled back 1 times"),
        ("checkpoint.every=100", "there is no checkpoint"),
        ("train.bad_steps=100", "the run has rolled back 2 times"),
    ],
)
def test_a_hopeless_run_ends(alone: Ranks, options: list[str], tmp_path: Path, change: str, why: str) -> None:
    config = load("mim", [*options, "train.bad_steps=2", "checkpoint.every=3", change])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.wrong = range(12, 1000)
    with pytest.raises(W2SError, match=rf"was not a number, or a spike, and {why}: lower optim\.lr"):
        train(run)
    newest = checkpoint_folders.latest(tmp_path / "run")
    assert newest is None or newest.name == "step-00000003", "nothing is saved on bad steps"


def test_nothing_is_saved_where_a_signal_follows_a_bad_step(alone: Ranks, options: list[str], tmp_path: Path) -> None:
    config = load("mim", options)
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.wrong, stage.stop_at = range(4, 8), 2
    with pytest.raises(StopRun, match="stopped by SIGTERM at step 2, not saved: it was skipped"):
        train(run)
    assert checkpoint_folders.latest(tmp_path / "run") is None


class FullDisk:
    """A disk without space after some of a stage's updates, so that a call is refused there."""

    def __init__(self, stage: Counting, after: Container[int], call: str) -> None:
        self._stage, self._after, self._call = stage, after, call
        self._genuine, self._trainer = resolve_name(call), os.getpid()

    def __call__(self, *arguments: Any) -> Any:
        full = self._stage.calls.count("update") in self._after
        if full and (self._call != FLUSH or os.getpid() != self._trainer):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._genuine(*arguments)


BEGIN, FLUSH, SEAL = "os.posix_fallocate", "os.fsync", "w2s.checkpoint.own.checkpoint_folders.seal"
"""Where a disk can turn out to be full: before the tensors, in the process that writes them, after them."""


@pytest.mark.parametrize(("call", "background"), [(BEGIN, "false"), (FLUSH, "true"), (SEAL, "false")])
def test_a_full_disk_is_outlived(
    alone: Ranks,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
    background: str,
) -> None:
    every_step = ["checkpoint.every=1", "checkpoint.failures=3", "checkpoint.keep=9"]
    config = load("mim", [*options, *every_step, f"checkpoint.async_save={background}"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    monkeypatch.setattr(call, FullDisk(stage, {3, 4, 6}, call))
    train(run)
    out = " ".join(capsys.readouterr().out.split())
    refused = re.findall(r"No space left on device\).*?training continues, (step-\d+) stands \((\d) of at most 3", out)
    found = [checkpoint_folders.step_of(path) for path in checkpoint_folders.all_of(tmp_path / "run")]
    if background == "false":
        assert found == [1, 2, 5, 7]
        assert refused == [("step-00000002", "1"), ("step-00000002", "2"), ("step-00000005", "1")]
    assert found[-1] == 7 and refused
    assert [path.name for path in checkpoint_folders.checkpoints_of(tmp_path / "run").glob(".*")] == []
    assert [line["step"] for line in read_history(tmp_path / "run")] == list(range(8))


@pytest.mark.parametrize(("full_from", "steps", "last"), [(1, 1, None), (3, 5, 2), (7, 7, 6)])
def test_a_disk_that_stays_full_ends_the_run(
    alone: Ranks,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_from: int,
    steps: int,
    last: int | None,
) -> None:
    """At once where no checkpoint stands, after three failures, and where the last step's is missing."""
    config = load("mim", [*options, "checkpoint.every=1", "checkpoint.failures=3"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    monkeypatch.setattr(BEGIN, FullDisk(stage, range(full_from, 100), BEGIN))
    with pytest.raises(CheckpointError, match=r"cannot write .* \(No space left on device\): free some space or"):
        train(run)
    newest = checkpoint_folders.latest(tmp_path / "run")
    assert (run.step, newest and checkpoint_folders.step_of(newest)) == (steps, last)


def test_a_run_that_fails_leaves_no_writer(
    alone: Ranks, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("mim", [*options, "checkpoint.every=2", "checkpoint.async_save=true"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    monkeypatch.setattr("w2s.megatron.checkpoint.async_save._WriterResults.put", lambda *_: signal.pause())
    writers: list[psutil.Process] = []

    def fail_while_it_is_written() -> None:
        if WRITER in run.heartbeat.helpers:
            writers.extend(map(psutil.Process, run.heartbeat.helpers[WRITER]()))
            raise RuntimeError("broken")

    monkeypatch.setattr(stage, "after_update", fail_while_it_is_written)
    with pytest.raises(RuntimeError, match="broken"):
        train(run)
    assert writers and not running_after(writers, 10)


def test_a_report_that_is_refused_hides_no_error(tmp_path: Path) -> None:
    class Full(Tracker):
        def finish(self, status: str) -> None:
            raise UserError("cannot write report.html")

    config = load("mim", ["hardware=cpu", "tracking.enabled=false", f"run.root={tmp_path}"])
    with pytest.raises(W2SError, match="broken"), tracked(Full(config, tmp_path, main=False)):
        raise W2SError("broken")
    with pytest.raises(UserError, match=r"report\.html"), tracked(Full(config, tmp_path, main=False)):
        pass


def test_a_stop_on_a_full_disk_says_that_nothing_was_saved(
    alone: Ranks, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load("mim", [*options, "checkpoint.every=2"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    stage.stop_at = 3
    monkeypatch.setattr(BEGIN, FullDisk(stage, {3}, BEGIN))
    with pytest.raises(StopRun, match=r"at step 3, not saved: cannot write .*No space left.*: repeat the command"):
        train(run)


@pytest.mark.parametrize("repaired", [True, False])
def test_replicas_that_differ(
    alone: Ranks,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    repaired: bool,
) -> None:
    found = iter([[], [Divergence("vision.norm.weight", (1,) if repaired else (0, 1), repaired)]])
    monkeypatch.setattr("w2s.training.following.repair", lambda *_: next(found, []))
    config = load("mim", [*options, "train.check_replicas=2", "checkpoint.every=3"])
    run = start_run(stage := Counting(config, alone), config, tmp_path / "run", alone)
    train(run)
    printed = capsys.readouterr().out
    assert f"step 4: vision.norm.weight differs on ranks {[1] if repaired else [0, 1]}" in printed
    assert ("rolled back to step 3, the samples of steps 4 to 4 are read again" in printed) == (not repaired)
    assert stage.indices == [*range(16), *range(16 if repaired else 12, 28)]
