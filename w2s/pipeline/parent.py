"""The MLflow run above the steps of a pipeline, and what it is told, so that pipelines can be compared there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean

from w2s.config.sections import TrackingConfig
from w2s.errors import StopRun
from w2s.pipeline.results import Run
from w2s.pipeline.tasks import Plan
from w2s.redaction import redact
from w2s.tracking.headlines import readings
from w2s.tracking.mlflow.run import MlflowRun, Status


@contextmanager
def parent_run(
    tracking: TrackingConfig, folder: Path, *, tags: Mapping[str, str], params: Mapping[str, object]
) -> Iterator[MlflowRun]:
    """The MLflow run above the stages of one `w2s run`; give its `run_id` to them as `tracking.parent_run`.

    It ends as FINISHED, as KILLED after a request to stop, or as FAILED after any other exception.

    Args:
        tracking: section `tracking` of the configuration.
        folder: folder of the group, in the folder of all runs; its name is the run's name.
        tags: tags of the run.
        params: its parameters.
    """
    quiet = replace(tracking, system_metrics=False)  # the stages log them
    run = MlflowRun(quiet, folder.parent, folder.name, tags=tags, params=params, folder=folder)
    status: Status = "FAILED"
    try:
        _ = run.run_id  # for which its children wait
        yield run
        status = "FINISHED"
    except (StopRun, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        run.end(status)


def parent_params(name: str, plan: Plan) -> dict[str, object]:
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


def headline_means(runs: Sequence[Run]) -> dict[str, float]:
    """The headlines of a step as `STEP/METRIC`, each the mean of the runs that have it.

    Args:
        runs: the step's finished runs, at least one.
    """
    values_of: dict[str, list[float]] = {}
    for run in runs:
        for reading in readings(run.metrics):
            values_of.setdefault(f"{run.task.step.name}/{reading.metric}", []).append(reading.value)
    return {name: mean(values) for name, values in values_of.items()}
