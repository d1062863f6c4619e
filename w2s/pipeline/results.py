"""What the runs of a pipeline have left behind: results and history, and what their training took."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from w2s.config.naming import run_folder
from w2s.config.sections import Config
from w2s.pipeline.flops import training_flops
from w2s.pipeline.plan import Task
from w2s.pipeline.steps import Pipeline, Step
from w2s.tracking.history import read_history


@dataclass(frozen=True)
class Run:
    """A finished run."""

    task: Task
    config: Config

    @property
    def folder(self) -> Path:
        """Its folder."""
        return run_folder(self.config)

    @cached_property
    def result(self) -> dict[str, Any]:
        """Its result.json: stage, metrics, seconds and peak memory."""
        content: dict[str, Any] = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
        return content

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the finished stage by name."""
        metrics: Mapping[str, float] = self.result["metrics"]
        return metrics

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl."""
        return read_history(self.folder)

    @property
    def samples(self) -> int:
        """Training samples."""
        return self.config.train.steps * self.config.train.global_batch if self.config.stage != "eval" else 0

    @cached_property
    def flops(self) -> float:
        """Model FLOPs of its training, the teacher's included."""
        return training_flops(self.config)

    @cached_property
    def training_seconds(self) -> float:
        """Seconds of its training steps, without the start, evaluations and checkpoints."""
        lines = [line for line in self.history if "seconds_per_step" in line]
        before = [0, *(line["step"] for line in lines)]
        return sum(line["seconds_per_step"] * (line["step"] - step) for line, step in zip(lines, before, strict=False))


@dataclass(frozen=True)
class Results:
    """The finished runs of a pipeline, without the trials of its choices."""

    pipeline: Pipeline
    runs: Sequence[Run]

    def of(self, step: Step) -> list[Run]:
        """The runs of a step, in the order of the seeds."""
        return self.named(step.name)

    def named(self, name: str) -> list[Run]:
        """The runs of the step of that name, in the order of the seeds."""
        return [run for run in self.runs if run.task.step.name == name]
