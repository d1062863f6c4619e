"""What training costs: samples, seconds and floating-point operations, of a run and of all that it builds on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from w2s.pipeline.results import Results, Run
from w2s.pipeline.steps import Step, ancestors


@dataclass(frozen=True)
class Cost:
    """What a training took, or several in a row."""

    samples: int
    """Samples seen."""
    seconds: float
    """Seconds of the training steps, without starts, evaluations and checkpoints."""
    flops: float
    """Model FLOPs, the teacher's included."""


def of_run(run: Run) -> Cost:
    """The cost of a run."""
    return Cost(run.samples, run.training_seconds, run.flops)


def of_chain(results: Results, step: Step, without: Collection[str] = ()) -> list[Cost]:
    """For each seed, the cost of all training that a step builds on, its own and its teachers' included.

    Of a run whose checkpoint in the middle is taken, what came before that checkpoint counts.

    Args:
        results: of all runs.
        step: the step.
        without: names of steps whose training does not count, nor that of what only they build on.
    """
    by_seed = zip(*(results.of(each) for each in ancestors(results.pipeline, step, without)), strict=True)
    return [_sum([of_run(run) for run in used(runs)]) for runs in by_seed]


def used(runs: Sequence[Run]) -> list[Run]:
    """The trainings among runs that build on each other, in their order, each as far as the later ones take it."""
    cut = [run.used_by(runs[number + 1 :]) for number, run in enumerate(runs)]
    return [run for run in cut if run.config.stage != "eval"]


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(
        sum(cost.samples for cost in costs), sum(cost.seconds for cost in costs), sum(cost.flops for cost in costs)
    )
