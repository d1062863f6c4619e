"""Runs of the stages on little data, and reading what they leave behind."""

import importlib
import json
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from w2s.config.load import load
from w2s.config.naming import run_folder
from w2s.config.sections import Config
from w2s.megatron.parallel.optimizer import Optimizer

DEADLINE = 120.0
"""Seconds after which a command that did not come as far as it should is a failure."""

QUIET = ("tracking.enabled=false", "eval.shards=", "eval.knn_shards=")
"""Overrides for a run of which only the steps are of interest."""


def run_in_process(config: Config) -> Path:
    """Run a stage in this process and return its folder."""
    importlib.import_module(f"w2s.stages.{config.stage}").run(config)
    return run_folder(config)


def run_stage(stage: str, overrides: Sequence[str]) -> Path:
    return run_in_process(load(stage, overrides))


def records(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a running or killed command may have left half a line at its end."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def history(run: Path, name: str) -> list[float]:
    """A metric of training at every step."""
    return [record[name] for record in records(run) if name in record]


def result(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def start_command(*arguments: str) -> subprocess.Popen[str]:
    """Start the `w2s` command, one thread, in a process group of its own."""
    command = Path(sysconfig.get_path("scripts")) / "w2s"
    return subprocess.Popen(
        [str(command), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def interrupt(command: subprocess.Popen[str], signum: signal.Signals, run: Path, step: int) -> tuple[int, str]:
    """Send a signal once the command has logged `step`; return its exit code and what it wrote to stderr."""
    end = time.monotonic() + DEADLINE
    while not any(record["step"] >= step for record in records(run)):
        if command.poll() is not None or time.monotonic() > end:
            command.kill()
            raise AssertionError(f"the command did not come to step {step}: {command.communicate()[1]}")
        time.sleep(0.01)
    command.send_signal(signum)
    error = command.communicate(timeout=DEADLINE)[1]
    return command.returncode, error


def after_each_update(optimizer: Optimizer | type[Optimizer], call: Callable[[], None]) -> None:
    """Call after every update of an optimizer, or of all of them."""
    genuine = optimizer.step

    def step(*arguments: Any) -> Tensor:
        norm = genuine(*arguments)
        call()
        return norm

    optimizer.step = step  # type: ignore[method-assign]


@contextmanager
def killed_at_each_update(signum: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """Inside, this process sends itself a signal after every update."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", Optimizer.step)  # what comes back at the end
        after_each_update(Optimizer, lambda: os.kill(os.getpid(), signum))
        yield
