"""What the runs of a pipeline have left behind: results and history, what their training took, what trials chose."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from w2s.checkpoint.own.checkpoint_folders import STEP_NAME
from w2s.config.naming import flatten, run_folder
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.pipeline.steps import Choice, Pipeline, Step, ancestors
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
        path = re.compile(rf"{re.escape(str(self.folder.absolute()))}(/checkpoints/{STEP_NAME.pattern})?(?![\w-])")
        values = [text for other in others for text in flatten(asdict(other.config)).values() if isinstance(text, str)]
        steps = [int(used[2] or self.config.train.steps) for text in values for used in path.finditer(text)]
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


@dataclass(frozen=True)
class TrialOutcome:
    """What a step has chosen, and why."""

    step: Step
    choice: Choice
    trials: Sequence[Run]
    """A run for each candidate."""

    @property
    def scores(self) -> list[float]:
        """The metric of each trial.

        Raises:
            ConfigError: a trial has no such metric.
        """
        by = self.choice.by
        for trial in self.trials:
            if by not in trial.metrics:
                known = ", ".join(trial.metrics) or "none"
                raise ConfigError(f"{self.step.name}: choose.by={by} is not a metric of a trial: there are {known}")
        return [trial.metrics[by] for trial in self.trials]

    @property
    def value(self) -> str:
        """The candidate with the greatest score; of equal ones the earlier."""
        scores = self.scores
        return self.choice.among[scores.index(max(scores))]


@dataclass(frozen=True)
class Cost:
    """What a training took, or several in a row."""

    samples: int
    """Samples seen."""
    seconds: float
    """Seconds of the training steps, without starts, evaluations and checkpoints."""
    flops: float
    """Model FLOPs, the teacher's included."""

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Cost":
        """The cost of all these runs."""
        return cls(
            sum(run.samples for run in runs),
            sum(run.training_seconds for run in runs),
            sum(run.flops for run in runs),
        )


def chain_costs(results: Results, step: Step, without: Collection[str] = ()) -> list[Cost]:
    """For each seed, the cost of all training that a step builds on, its own and its teachers' included.

    Of a run whose checkpoint in the middle is taken, what came before that checkpoint counts.

    Args:
        results: of all runs.
        step: the step.
        without: names of steps whose training does not count, nor that of what only they build on.
    """
    by_seed = zip(*(results.of(each) for each in ancestors(results.pipeline, step, without)), strict=True)
    return [Cost.of(trainings(runs)) for runs in by_seed]


def trainings(runs: Sequence[Run]) -> list[Run]:
    """The trainings among runs that build on each other, in their order, each as far as the later ones take it."""
    cut = [run.used_by(runs[index + 1 :]) for index, run in enumerate(runs)]
    return [run for run in cut if run.config.stage != "eval"]


def on_the_way(runs: Sequence[Run], metric: str) -> dict[int, list[float]]:
    """The values of a metric in all runs by the samples seen, wherever every run was measured."""
    measured = [
        {line["samples_seen"]: line[metric] for line in run.history if line.get(metric) is not None} for run in runs
    ]
    return {
        samples: [values[samples] for values in measured]
        for samples in measured[0]
        if all(samples in values for values in measured)
    }


def spread(values: Sequence[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")
