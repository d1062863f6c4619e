"""What a file of `configs/run` says: steps in order, seeds that each is repeated with, and what a step chooses."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w2s.config.fields import nearest
from w2s.config.load import STAGES, read_document
from w2s.errors import ConfigError

REFERENCE = re.compile(r"\{([A-Za-z_]\w*)\}")
"""`{NAME}` in an override: the folder of an earlier step, of the same seed."""


@dataclass(kw_only=True)
class Choice:
    """A value that is chosen by trials before the first run of its step."""

    key: str
    """Key whose value is chosen, such as `optim.lr`."""
    among: list[str]
    """Candidates; each has one trial, with the first seed."""
    by: str
    """Metric in the trials' results; the candidate with the greatest wins, of equal ones the earlier."""
    share: float = 1.0
    """Length of a trial, as a fraction of the step's train.steps and optim.warmup."""


@dataclass(kw_only=True)
class Step:
    """One stage of a pipeline."""

    name: str
    """Name of the step, and of its folder."""
    stage: str
    """The stage that it runs."""
    overrides: list[str] = field(default_factory=list)
    """As on the command line of `w2s stage`; `{NAME}` stands for the folder of an earlier step."""
    compute_of: list[str] = field(default_factory=list)
    """Earlier steps whose training compute this one has in all: train.steps is as many as their FLOPs pay for."""
    choose: Choice | None = None
    """A value that trials choose; one that the command line gives is not chosen."""
    beside: list[str] = field(default_factory=list)
    """Steps whose figures stand beside this one's in the tables."""


@dataclass(kw_only=True)
class Pipeline:
    """A file of `configs/run`."""

    title: str
    """Heading of the report."""
    experiment: str = "w2s"
    """MLflow experiment of all steps."""
    seeds: list[int] = field(default_factory=list)
    """Every step is run with each of these as its run.seed; empty runs it once, with the seed of its overrides."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every step, before its own."""
    on_stage: dict[str, list[str]] = field(default_factory=dict)
    """Further overrides of every step of a stage, by the stage's name."""
    steps: list[Step]
    """What is run, in this order; of several seeds, evaluations come after all training."""


def load_pipeline(name: str) -> Pipeline:
    """Read a pipeline.

    Args:
        name: a file of `configs/run`, or a path that ends in `.yaml`.

    Raises:
        ConfigError: when there is none of this name, or the file is not of this form.
    """
    document = read_document("run", name)
    try:
        pipeline = cast(Pipeline, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Pipeline), document)))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"run/{name}: {error.full_key}: {reason}; see configs/run/default.yaml") from error
    for mistake in _mistakes(pipeline):
        raise ConfigError(f"run/{name}: {mistake}")
    return pipeline


def ancestors(pipeline: Pipeline, step: Step) -> list[Step]:
    """The steps whose results go into a step, in their order; the step itself is the last."""
    named = {other.name: other for other in pipeline.steps}
    wanted = {step.name}
    for other in reversed(pipeline.steps):
        if other.name in wanted:
            wanted |= references(other) & named.keys()
    return [other for other in pipeline.steps if other.name in wanted]


def references(step: Step) -> set[str]:
    """Names of the steps whose folders a step's overrides ask for."""
    return {name for override in step.overrides for name in REFERENCE.findall(override)}


def _mistakes(pipeline: Pipeline) -> Iterator[str]:
    names = [step.name for step in pipeline.steps]
    if not names or len(set(names)) < len(names):
        yield f"steps are named {names}: give at least one, each with a name of its own"
    if len(set(pipeline.seeds)) < len(pipeline.seeds):
        yield f"seeds={pipeline.seeds} has a seed twice: give different ones"
    for stage in pipeline.on_stage.keys() - set(STAGES):
        yield f"on_stage: there is no stage {stage}: did you mean {nearest(stage, STAGES)}?"
    for number, step in enumerate(pipeline.steps):
        for other in [*step.compute_of, *step.beside]:
            if other not in names:
                yield f"{step.name}: there is no step {other}: did you mean {nearest(other, names)}?"
        later = [other for other in step.compute_of if other not in names[:number]]
        if later:
            yield f"{step.name}: compute_of={later} are no earlier steps: move {step.name} behind them"
        if step.stage == "eval" and (step.choose or step.compute_of):
            yield f"{step.name}: an evaluation trains nothing: leave out choose and compute_of"
        if step.choose:
            yield from _mistakes_of_choice(step.name, step.choose)


def _mistakes_of_choice(name: str, choice: Choice) -> Iterator[str]:
    if len(set(choice.among)) < max(2, len(choice.among)):
        yield f"{name}: choose.among={choice.among}: give at least two candidates, each once"
    if not 0 < choice.share <= 1:
        yield f"{name}: choose.share={choice.share} must be in (0, 1]"
