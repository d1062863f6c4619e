"""What the runs of a pipeline have left behind: results and history, and what their training took."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from w2s.checkpoint.own.checkpoint_folders import STEP_NAME
from w2s.config.naming import flatten, run_folder
from w2s.config.sections import Config
from w2s.pipeline.steps import Pipeline, Step
from w2s.pipeline.tasks import Task
from w2s.pipeline.training_flops import training_flops
from w2s.tracking.history import read_history


@dataclass(frozen=True)
class Run:
    """A finished run."""

    task: Task
    config: Config
    begins_at: int = 0
    """Steps of another run that it continues from; its cost is that of the steps after them."""

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
        steps = self.config.train.steps - self.begins_at
        return steps * self.config.train.global_batch if self.config.stage != "eval" else 0

    @cached_property
    def flops(self) -> float:
        """Model FLOPs of its training, the teacher's included."""
        return training_flops(self.config, begins_at=self.begins_at)

    @cached_property
    def training_seconds(self) -> float:
        """Seconds of its training steps, without the start, evaluations and checkpoints."""
        lines = [line for line in self.history if "seconds_per_step" in line]
        before, last = [self.begins_at, *(line["step"] for line in lines)], self.config.train.steps
        return sum(
            line["seconds_per_step"] * (min(line["step"], last) - step)
            for line, step in zip(lines, before, strict=False)
            if step < last
        )

    def up_to(self, step: int) -> "Run":
        """The run as if it had ended at a step."""
        train = replace(self.config.train, steps=step)
        return replace(self, config=replace(self.config, train=train))

    def used_by(self, others: Iterable["Run"]) -> "Run":
        """The run up to the last of its checkpoints that some of the others take, if they do not take its end."""
        own = re.compile(rf"{re.escape(str(self.folder.absolute()))}(/checkpoints/{STEP_NAME.pattern})?(?![\w-])")
        values = [text for other in others for text in flatten(asdict(other.config)).values() if isinstance(text, str)]
        steps = [int(used[2] or self.config.train.steps) for text in values for used in own.finditer(text)]
        return self.up_to(max(steps)) if steps else self


@dataclass(frozen=True)
class Results:
    """The finished runs of a pipeline, without the trials of its choices."""

    pipeline: Pipeline
    runs: Sequence[Run]

    def of(self, step: Step) -> list[Run]:
        """The runs of a step, in the order of the seeds; one that they share stands for each."""
        return self.named(step.name)

    def named(self, name: str) -> list[Run]:
        """The runs of the step of that name, as `of` gives them."""
        runs = [run for run in self.runs if run.task.step.name == name]
        return [run for run in runs for _ in (self.pipeline.seeds if run.task.step.shared else [None])]
