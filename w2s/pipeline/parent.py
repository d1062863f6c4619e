"""What the MLflow run above the steps of a pipeline is told, so that pipelines can be compared there."""

from collections.abc import Sequence
from statistics import mean

from w2s.pipeline.results import Run
from w2s.pipeline.tasks import Plan
from w2s.redaction import redact
from w2s.tracking.headlines import readings


def params(name: str, plan: Plan) -> dict[str, object]:
    """The pipeline's name and seeds, and `STEP.KEY` for each key that a step is given, with its train.steps.

    A value that trials are to choose is left out until they have.
    """
    facts: dict[str, object] = {"pipeline": redact(name), "seeds": plan.pipeline.seeds or "of the overrides"}
    for step in plan.pipeline.steps:
        overrides = [each for each in plan.overrides(step) if not each.startswith(("tracking.", "run."))]
        given = dict(override.split("=", 1) for override in overrides)
        if step.stage != "eval":
            task = next(task for task in plan.tasks() if task.step is step)
            given["train.steps"] = str(plan.config(task, {}).train.steps)
        choice = plan.choice(step)
        facts |= {
            f"{step.name}.{key}": redact(value) for key, value in given.items() if not choice or key != choice.key
        }
    return facts


def metrics(runs: Sequence[Run]) -> dict[str, float]:
    """The headlines of a step as `STEP/METRIC`, each the mean of the runs that have it.

    Args:
        runs: the step's finished runs, at least one.
    """
    values_of: dict[str, list[float]] = {}
    for run in runs:
        for reading in readings(run.metrics):
            values_of.setdefault(f"{run.task.step.name}/{reading.metric}", []).append(reading.value)
    return {name: mean(values) for name, values in values_of.items()}
