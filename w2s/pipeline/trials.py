"""A value of a step that trials choose."""

from collections.abc import Sequence
from dataclasses import dataclass

from w2s.errors import ConfigError
from w2s.pipeline.results import Run
from w2s.pipeline.steps import Choice, Step


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
        return [_score(self.step, self.choice, trial) for trial in self.trials]

    @property
    def value(self) -> str:
        """The candidate with the greatest score; of equal ones the earlier."""
        scores = self.scores
        return self.choice.among[scores.index(max(scores))]


def _score(step: Step, choice: Choice, trial: Run) -> float:
    if choice.by not in trial.metrics:
        known = ", ".join(trial.metrics) or "none"
        raise ConfigError(f"{step.name}: choose.by={choice.by} is not a metric of a trial: there are {known}")
    return trial.metrics[choice.by]
