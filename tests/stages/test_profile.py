"""Profiled steps of a run."""

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from tests.stages.runs import QUIET, history, run_stage
from w2s.config.load import load
from w2s.config.stage_checks import check_evaluation
from w2s.errors import ConfigError
from w2s.training.callbacks import Training
from w2s.training.profiling import Profiler


def profiled(base: list[str], steps: str) -> tuple[Path, Counter[str]]:
    """A run's folder of profiles, and how often each operator ran in its trace."""
    run = run_stage("mim", [*base, *QUIET, "train.steps=4", f"train.profile={steps}", f"run.name=profiled-{steps}"])
    (trace,) = (run / "profile").glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return run / "profile", Counter(event["name"] for event in events if event.get("cat") == "cpu_op")


def test_only_the_steps_that_are_asked_for(base: list[str]) -> None:
    folder, two = profiled(base, "2-3")
    _, one = profiled(base, "3-3")
    assert two["aten::addmm"] == 2 * one["aten::addmm"] > 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps-2-3.rank-0.operators.txt",
        "steps-2-3.rank-0.trace.json.gz",
    ]
    table = (folder / "steps-2-3.rank-0.operators.txt").read_text()
    assert "aten::addmm" in table and "Self CPU Mem" in table


def test_the_steps_that_a_run_takes_are_named(base: list[str]) -> None:
    folder, _ = profiled(base, "3-9")
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {"steps-3-4"}


def test_a_run_may_go_back_before_the_first_of_them_and_end(tmp_path: Path) -> None:
    messages: list[str] = []
    tracker = SimpleNamespace(message=messages.append, artifact=lambda *_: None)
    ranks = SimpleNamespace(rank=0, data_rank=0, device=torch.device("cpu"))
    profiler = Profiler(range(3, 6))
    profiler.begin(cast(Training, SimpleNamespace(folder=tmp_path, tracker=tracker, ranks=ranks)))
    for step in (3, 4, 1):
        profiler.before_step(step)
        profiler.after_step(step, {})
    profiler.end()
    assert messages == [f"profile of steps 1 to 4: {tmp_path / 'profile'}"]


def test_an_evaluation_has_no_steps_to_profile() -> None:
    for option in ("train.profile=1-2", "train.callbacks=[a:B]"):
        with pytest.raises(ConfigError, match=rf"^{option.partition('=')[0]}=.* is not for stage eval"):
            check_evaluation(load("eval", [option]))


@pytest.mark.parametrize("steps", ["10", "5-2", "0-3", "a-b", "1-2-3"])
def test_what_is_not_steps(steps: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.profile={steps} is not FIRST-LAST"):
        load("mim", [f"train.profile={steps}"])


def test_steps_that_are_never_taken() -> None:
    with pytest.raises(ConfigError, match=r"^train\.profile=10-15 begins after train\.steps=9"):
        load("mim", ["train.profile=10-15", "train.steps=9"])
    assert load("mim", ["train.profile=10-15", "train.steps=10"]).train.profiled[-1] == 15


def test_a_profile_that_cannot_be_written_does_not_end_the_run(
    base: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_the_way = root / "profiled-not" / "profile"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    run = run_stage("mim", [*base, *QUIET, "train.steps=2", "train.profile=1-1", f"run.name={in_the_way.parent.name}"])
    assert run == in_the_way.parent and len(history(run, "loss")) == 2
    assert "warning: the profile cannot be written" in " ".join(capsys.readouterr().out.split())
