"""What a file of `configs/run` says: steps in order, seeds that each is repeated with, and what a step chooses."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from w2s.config.fields import nearest
from w2s.config.load import STAGES, read_document
from w2s.config.sections import OptimConfig
from w2s.errors import ConfigError

REFERENCE = re.compile(r"\{([A-Za-z_]\w*)\}")
"""`{NAME}` in an override: the folder of an earlier step, of the same seed where that step is not shared."""


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Lengths that one training is read out at: a trunk at a constant rate, and from it a cool-down to each length."""

    steps: list[int]
    """The lengths, in steps from the first one, rising; each becomes a step of its own, called STEP_LENGTH."""
    cooldown: float = 0.2
    """Their optim.cooldown: the share of each length in which the learning rate falls."""

    def start(self, length: int) -> int:
        """Where on the trunk the cool-down to a length begins, in steps."""
        return OptimConfig(cooldown=self.cooldown).cooldown_start(length)


@dataclass(frozen=True, kw_only=True)
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
    budgets: Budgets | None = None
    """Lengths that this training is read out at: the step itself is their trunk."""
    trunk: str = ""
    """The step that this one branches off, whose choice it shares; set for each length of `budgets`."""
    shared: bool = False
    """Run it once, with the first seed, for all seeds: a teacher that there is one of."""
    beside: list[str] = field(default_factory=list)
    """Steps whose figures stand beside this one's in the tables."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trainings of different length compared by a metric and by what they cost, in two ledgers."""

    metric: str
    """Metric in the results of training runs, the greater the better."""
    baseline: str
    """Step with `budgets` that each other training is compared with, at no less compute."""
    exists: list[str] = field(default_factory=list)
    """Steps whose training one ledger does not count, as if they had been there before: teachers."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A file of `configs/run`."""

    title: str
    """Heading of the report."""
    experiment: str = "w2s"
    """MLflow experiment of all steps, where the command line does not name one (tracking.experiment)."""
    seeds: list[int] = field(default_factory=list)
    """Every step is run with each of these as its run.seed; empty runs it once, with the seed of its overrides."""
    overrides: list[str] = field(default_factory=list)
    """Overrides of every step, before its own."""
    on_stage: dict[str, list[str]] = field(default_factory=dict)
    """Further overrides of every step of a stage, by the stage's name."""
    compare: Comparison | None = None
    """What the trainings are compared by, over their compute."""
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
    pipeline = replace(pipeline, steps=[each for step in pipeline.steps for each in _read_out(step)])
    for mistake in _mistakes_of_references(pipeline):
        raise ConfigError(f"run/{name}: {mistake}")
    return pipeline


def _read_out(step: Step) -> Iterator[Step]:
    """A step and, where it has budgets, the steps of its lengths behind it."""
    budgets = step.budgets
    if budgets is None:
        yield step
        return
    starts = [budgets.start(length) for length in budgets.steps]
    schedule = ["optim.schedule=constant"]
    trunk = [f"train.steps={starts[-1]}", f"checkpoint.keep_at={starts}", "optim.cooldown=0"]
    yield replace(step, overrides=[*step.overrides, *schedule, *trunk])
    for length, start in zip(budgets.steps, starts, strict=True):
        branch = [
            *("init.vision=none", "init.text=none", "init.grow=none", "init.grow_width=none"),  # the trunk has them
            f"init.checkpoint={{{step.name}}}/checkpoints/step-{start:08d}",
            f"train.steps={length}",
            f"optim.cooldown={budgets.cooldown}",
        ]
        overrides = [*step.overrides, *schedule, *branch]
        name = f"{step.name}_{length}"
        yield Step(name=name, stage=step.stage, overrides=overrides, trunk=step.name, shared=step.shared)


def ancestors(pipeline: Pipeline, step: Step, without: Collection[str] = ()) -> list[Step]:
    """The steps whose results go into a step, in their order; the step itself is the last.

    Args:
        pipeline: all steps.
        step: the step.
        without: names of steps that are left out, with their lengths and with what only they build on.
    """
    named = {other.name: other for other in pipeline.steps if not {other.name, other.trunk} & set(without)}
    wanted = {step.name}
    for other in reversed(pipeline.steps):
        if other.name in wanted:
            wanted |= references(pipeline, other) & named.keys()
    return [other for other in pipeline.steps if other.name in wanted]


def references(pipeline: Pipeline, step: Step) -> set[str]:
    """Names of the steps whose folders a step's overrides ask for, those of its stage and of all steps included."""
    overrides = [*pipeline.overrides, *pipeline.on_stage.get(step.stage, []), *step.overrides]
    return {name for override in overrides for name in REFERENCE.findall(override)}


def _mistakes(pipeline: Pipeline) -> Iterator[str]:
    """What is wrong with the steps one by one."""
    names = [step.name for step in pipeline.steps]
    if not names or len(set(names)) < len(names):
        yield f"steps are named {names}: give at least one, each with a name of its own"
    if len(set(pipeline.seeds)) < len(pipeline.seeds):
        yield f"seeds={pipeline.seeds} has a seed twice: give different ones"
    for stage in pipeline.on_stage.keys() - set(STAGES):
        yield f"on_stage: there is no stage {stage}: did you mean {nearest(stage, STAGES)}?"
    for step in pipeline.steps:
        if step.stage == "eval" and (step.choose or step.compute_of or step.budgets):
            yield f"{step.name}: an evaluation trains nothing: leave out choose, compute_of and budgets"
        if step.trunk:
            yield f"{step.name}: trunk is set by budgets alone: leave it out"
        if step.budgets:
            yield from _mistakes_of_budgets(step.name, step.budgets)
        if step.choose:
            yield from _mistakes_of_choice(step.name, step.choose)


def _mistakes_of_choice(name: str, choice: Choice) -> Iterator[str]:
    if len(set(choice.among)) < max(2, len(choice.among)):
        yield f"{name}: choose.among={choice.among}: give at least two candidates, each once"
    if not 0 < choice.share <= 1:
        yield f"{name}: choose.share={choice.share} must be in (0, 1]"


def _mistakes_of_budgets(name: str, budgets: Budgets) -> Iterator[str]:
    if not budgets.steps or budgets.steps != sorted(set(budgets.steps)) or budgets.steps[0] < 2:
        yield f"{name}: budgets.steps={budgets.steps}: give rising lengths of at least 2 steps"
    elif not 0 < budgets.cooldown < 1 or not 0 < budgets.start(budgets.steps[0]) < budgets.steps[0]:
        yield f"{name}: budgets.cooldown={budgets.cooldown} of {budgets.steps[0]} steps is none, or all: use another"


def _mistakes_of_references(pipeline: Pipeline) -> Iterator[str]:
    """What is wrong with the steps that others name, those of the lengths included."""
    names = [step.name for step in pipeline.steps]
    per_seed = {step.name for step in pipeline.steps if not step.shared}
    for index, step in enumerate(pipeline.steps):
        for other in [*step.compute_of, *step.beside]:
            if other not in names:
                yield f"{step.name}: there is no step {other}: did you mean {nearest(other, names)}?"
        later = [other for other in step.compute_of if other in names[index:]]
        if later:
            yield f"{step.name}: compute_of={later} are not earlier steps: move {step.name} behind them"
        if step.shared and (others := sorted(references(pipeline, step) & per_seed)):
            reason = f"builds on {others[0]}, which has one run a seed"
            yield f"{step.name}: it is shared by all seeds and {reason}: share that too"
    compare = pipeline.compare
    if compare is None:
        return
    for other in [compare.baseline, *compare.exists]:
        if other not in names:
            yield f"compare: there is no step {other}: did you mean {nearest(other, names)}?"
    if not any(step.name == compare.baseline and step.budgets for step in pipeline.steps):
        yield f"compare.baseline={compare.baseline} has no budgets: give the step some, or another step"
