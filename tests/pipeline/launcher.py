"""Stands in the place of `launch_stage`: no stage runs, results are made up."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from w2s.config.naming import run_folder
from w2s.config.sections import Config
from w2s.pipeline.results import Results, Run
from w2s.pipeline.tasks import Plan
from w2s.processes.elastic import RankError

METRICS = {
    "mim": {"test/masked_cosine": 0.75, "test/constant_cosine": 0.25},
    "clip": {"loss": 1.0},
    "eval": {"zero_shot/top1": 0.125, "zero_shot/chance_top1": 0.001, "knn/top1": 0.5, "knn_teacher/top1": 0.625},
}


class Launcher:
    """Notes each configuration and leaves a result, except at one step.

    Args:
        measure: makes a run's metrics.
    """

    def __init__(self, measure: Callable[[Config], Mapping[str, float]]) -> None:
        self.configs: list[Config] = []
        self.broken = ""
        self.measure = measure

    def __call__(self, config: Config, ranks: int, restarts: int = 0) -> None:
        self.configs.append(config)
        self.restarts = restarts
        if config.run.name == self.broken:
            raise RankError("broken", 1)
        folder = run_folder(config)
        folder.mkdir(parents=True)
        metrics = dict(self.measure(config))
        result = {"stage": config.stage, "metrics": metrics, "seconds": 61.4, "peak_memory_gib": 1.5}
        (folder / "result.json").write_text(json.dumps(result))
        if config.stage != "eval":
            lines = [self._line(config, step, metrics) for step in (config.train.steps // 2, config.train.steps)]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    @staticmethod
    def _line(config: Config, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """A line of metrics.jsonl: a quarter of a second a step."""
        return {"step": step, "samples_seen": step * config.train.global_batch, "seconds_per_step": 0.25, **metrics}

    @property
    def steps(self) -> list[str]:
        return [config.run.name for config in self.configs]


def by_stage(config: Config) -> Mapping[str, float]:
    return METRICS[config.stage]


def overrides(root: Path, *more: str) -> list[str]:
    return [f"run.root={root}", "tracking.enabled=false", "hardware=cpu", *more]


def finished(plan: Plan, measure: Callable[[Config], Mapping[str, float]]) -> Results:
    """The results of all runs of a pipeline, made up."""
    write, runs = Launcher(measure), []
    for task in plan.tasks():
        config = plan.config(task, {})
        runs.append(Run(task, config, plan.begins_at(task, config, {})))
        write(config, 1)
    return Results(plan.pipeline, runs)
