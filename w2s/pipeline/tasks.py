"""From a pipeline and a command line to the configuration of every run: its folder, its seed, what it builds on."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from w2s.checkpoint.own.checkpoint_folders import STEP_NAME, checkpoints_of, kept_steps, read_meta
from w2s.checkpoint.starts.continued import find_continued
from w2s.config.fields import nearest
from w2s.config.load import load
from w2s.config.naming import digest
from w2s.config.sections import Config, ModelConfig, TrackingConfig
from w2s.errors import ConfigError
from w2s.pipeline.steps import REFERENCE, Budgets, Choice, Pipeline, Step
from w2s.pipeline.training_flops import steps_of_equal_compute, training_flops

_KEYS_OF_PIPELINES = ("run.name", "run.group", "tracking.parent_run")
_SHARED_KEYS = ("tracking.uri", "tracking.experiment")
"""Keys that say where the MLflow run above all steps is."""

Chosen = Mapping[str, str]
"""Name of a step to the value that it has chosen."""


@dataclass(frozen=True)
class Task:
    """A run of a step."""

    step: Step
    seed: int | None = None
    """run.seed, or None for that of the overrides."""
    trial: int | None = None
    """Index of the candidate that is tried, or None for the run itself."""

    @property
    def name(self) -> str:
        """Name of its folder: `masked`, `masked-seed1` or `masked-seed1-try2`."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        trial = "" if self.trial is None else f"-try{self.trial + 1}"
        return f"{self.step.name}{seed}{trial}"


class Plan:
    """All runs of a pipeline.

    Args:
        pipeline: the steps.
        overrides: `key=value` for every step, `STEP:key=value` for one.
        fresh: use a new group of runs, also where there is one of the same configuration.

    Attributes:
        group: name of the folder of all runs, after a digest of all configurations: the same command finds it again.
        root: folder of the group.

    Raises:
        ConfigError: for an override that cannot be.
    """

    def __init__(self, pipeline: Pipeline, overrides: Sequence[str], *, fresh: bool) -> None:
        self.pipeline = pipeline
        self._steps = {step.name: step for step in pipeline.steps}
        self._known: dict[str, Config] = {}
        self._given = {step.name: _overrides_of(step, pipeline, overrides) for step in pipeline.steps}
        drafts = {step.name: load(step.stage, self.overrides(step)) for step in pipeline.steps}
        self.root = Path(next(iter(drafts.values())).run.root).expanduser()
        self.group = _group_name(self.root, f"run-{self._digest(drafts)}", fresh)

    @property
    def folder(self) -> Path:
        """Folder of all runs."""
        return self.root / self.group

    @property
    def tracking(self) -> TrackingConfig:
        """Where the MLflow run above the steps is; it is there if one of them has a run of its own."""
        sections = [self.config(task, {}).tracking for task in self.tasks()]
        return replace(sections[0], enabled=any(each.enabled for each in sections))

    def seeds(self) -> Sequence[int | None]:
        """The seeds; [None] for a pipeline that has none."""
        return self.pipeline.seeds or [None]

    def tasks(self) -> list[Task]:
        """All runs but the trials, in their order: seed by seed; of several, evaluations come after all training."""
        tasks = [
            Task(step, seed)
            for index, seed in enumerate(self.seeds())
            for step in self.pipeline.steps
            if index == 0 or not step.shared
        ]
        if self.pipeline.seeds:  # no test set is looked at before all training is over
            tasks.sort(key=lambda task: task.step.stage == "eval")
        return tasks

    def _earlier(self, task: Task) -> dict[str, Task]:
        """By step, the runs that a run may build on: those of earlier steps with its seed, or that all seeds share."""
        steps = self.pipeline.steps[: self.pipeline.steps.index(task.step)]
        return {step.name: Task(step, self.seeds()[0] if step.shared else task.seed) for step in steps}

    def _folder(self, task: Task) -> Path:
        return (self.folder / task.name).absolute()

    def choice(self, step: Step) -> Choice | None:
        """What a step chooses; None also where the overrides give that value."""
        choice = step.choose
        given = choice is not None and any(each.startswith(f"{choice.key}=") for each in self._given[step.name])
        return None if given else choice

    def trials(self, step: Step) -> list[Task]:
        """A run for each candidate of a step, with the first seed."""
        choice = self.choice(step)
        return [] if choice is None else [Task(step, self.seeds()[0], trial) for trial in range(len(choice.among))]

    def overrides(self, step: Step) -> list[str]:
        """All that a step is told, the later of two values counts; `{NAME}` stands for an earlier step's folder."""
        experiment = f"tracking.experiment={self.pipeline.experiment}"
        common = [experiment, *self.pipeline.overrides, *self.pipeline.on_stage.get(step.stage, [])]
        return [*common, *step.overrides, *self._given[step.name]]

    def config(self, task: Task, chosen: Chosen) -> Config:
        """The configuration of a run, with its folder in the group.

        Args:
            task: the run.
            chosen: what steps have chosen so far; the first candidate stands for what is not chosen yet.
        """
        key = f"{task.name} {sorted(chosen.items())}"
        if key not in self._known:
            self._known[key] = self._compose(task, chosen)
        return self._known[key]

    def _compose(self, task: Task, chosen: Chosen) -> Config:
        step = task.step
        choosing = self._steps[step.trunk] if step.trunk else step
        choice = self.choice(choosing)
        earlier = self._earlier(task)
        folders = {name: self._folder(other) for name, other in earlier.items()}
        overrides = [_fill(each, folders) for each in self.overrides(step)]
        if task.seed is not None:
            overrides.append(f"run.seed={task.seed}")
        if choice is not None:
            value = choice.among[task.trial] if task.trial is not None else chosen.get(choosing.name, choice.among[0])
            overrides.append(f"{choice.key}={value}")
        config = load(step.stage, overrides)
        config = replace(config, run=replace(config.run, group=self.group, name=task.name))
        if step.compute_of:
            flops = sum(self._flops(earlier[name], chosen) for name in step.compute_of)
            paid = steps_of_equal_compute(config, flops, self._teacher_models(task, config, chosen))
            steps = self.begins_at(task, config, chosen) + paid
            config = replace(config, train=replace(config.train, steps=steps))
        if choice is not None and task.trial is not None:
            return _shortened(config, choice.share, self.begins_at(task, config, chosen), step.budgets)
        return config

    def begins_at(self, task: Task, config: Config, chosen: Chosen) -> int:
        """The steps that are done when a run begins: those of the checkpoint that it continues from.

        Args:
            task: the run.
            config: its configuration.
            chosen: what steps have chosen so far.

        Raises:
            CheckpointError: no earlier step and no run has that checkpoint.
        """
        if config.stage == "eval" or config.init.checkpoint == "none":
            return 0
        named = STEP_NAME.fullmatch(Path(config.init.checkpoint).name)
        if named:
            return int(named[1])
        for other in self._earlier(task).values():
            if config.init.checkpoint == str(self._folder(other)):
                return self.config(other, chosen).train.steps
        checkpoint = find_continued(config)
        return 0 if checkpoint is None else read_meta(checkpoint).step

    def configs(self) -> list[Config]:
        """Every run's configuration as far as it is known before anything has run, the trials' last."""
        trials = [trial for step in self.pipeline.steps for trial in self.trials(step)]
        configs = []
        for task in [*self.tasks(), *trials]:
            configs.append(self.config(task, {}))
            self._check_checkpoint(task, configs[-1])
        return configs

    def _check_checkpoint(self, task: Task, config: Config) -> None:
        """Refuse a checkpoint in the middle of an earlier step that will not be there, before hours have passed."""
        path = Path(config.init.checkpoint)
        named = STEP_NAME.fullmatch(path.name)
        for name, other in self._earlier(task).items():
            if named and path.parent == checkpoints_of(self._folder(other)):
                earlier = self.config(other, {})
                if int(named[1]) not in kept_steps(earlier.train.steps, earlier.checkpoint):
                    raise ConfigError(
                        f"{task.step.name}: {name} does not keep a checkpoint of step {int(named[1])}: "
                        f"give it checkpoint.keep_at=[{int(named[1])}]"
                    )

    def _flops(self, task: Task, chosen: Chosen) -> float:
        """Model FLOPs of a run, whose teacher may be a run of an earlier step that is still to come."""
        config = self.config(task, chosen)
        return training_flops(config, self._teacher_models(task, config, chosen), self.begins_at(task, config, chosen))

    def _teacher_models(self, task: Task, config: Config, chosen: Chosen) -> dict[str, ModelConfig]:
        """By source, the models of the earlier steps that teach a run."""
        sources = {teacher.source for teacher in config.stage_teachers}
        earlier = {f"w2s:{self._folder(other)}": other for other in self._earlier(task).values()}
        return {source: self.config(earlier[source], chosen).model for source in sources & earlier.keys()}

    def _digest(self, drafts: Mapping[str, Config]) -> str:
        parts = [f"{name}:{config.stage}:{digest(config)}" for name, config in drafts.items()]
        parts += [f"{step.name}:{self.choice(step)}" for step in self.pipeline.steps if self.choice(step)]
        parts += [f"{step.name}:{step.compute_of}" for step in self.pipeline.steps if step.compute_of]
        parts += [f"{step.name}:shared" for step in self.pipeline.steps if step.shared]
        parts += [f"seeds:{self.pipeline.seeds}"] if self.pipeline.seeds else []
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _shortened(config: Config, share: float, begins_at: int, budgets: Budgets | None) -> Config:
    """A training, of which `begins_at` steps are done already, shortened to a share of its steps.

    Of a trunk, to a share of its longest length, with a cool-down.
    """
    whole = budgets.steps[-1] if budgets else config.train.steps
    steps = begins_at + max(1, round(share * (whole - begins_at)))
    optim = replace(config.optim, warmup=min(round(share * config.optim.warmup), steps - 1))
    config = replace(config, train=replace(config.train, steps=steps), optim=optim)
    if budgets is None:
        return config
    optim, checkpoint = replace(optim, cooldown=budgets.cooldown), replace(config.checkpoint, keep_at=[])
    return replace(config, optim=optim, checkpoint=checkpoint)


def _overrides_of(step: Step, pipeline: Pipeline, overrides: Sequence[str]) -> list[str]:
    """Those of the user's overrides that are meant for a step."""
    refused = (*_KEYS_OF_PIPELINES, "run.seed") if pipeline.seeds else _KEYS_OF_PIPELINES
    names = [other.name for other in pipeline.steps]
    given = []
    for override in overrides:
        key, equals, value = override.partition("=")
        target, colon, rest = key.rpartition(":")
        if colon and target not in names:
            raise ConfigError(
                f"{override}: there is no step {target}: did you mean {nearest(target, names)}? "
                f"The steps are {', '.join(names)}"
            )
        if rest in refused:
            raise ConfigError(f"{override}: `w2s run` sets {rest} itself: leave it out, or change run.root")
        if colon and rest in _SHARED_KEYS:
            raise ConfigError(f"{override}: the steps and the run above them have one {rest}: leave out {target}:")
        if target in ("", step.name, step.trunk):
            given.append(f"{rest}{equals}{value}")
    return given


def _group_name(root: Path, base: str, fresh: bool) -> str:
    """The newest group of this name, or one after it: run-1a2b3c4d, run-1a2b3c4d-2, ..."""
    newest, unused, count = base, base, 1
    while (root / unused).exists():
        count += 1
        newest, unused = unused, f"{base}-{count}"
    return unused if fresh else newest


def _fill(override: str, folders: Mapping[str, Path]) -> str:
    """An override with the folders of earlier steps in the place of `{NAME}`."""

    def folder(match: re.Match[str]) -> str:
        if match[1] not in folders:
            raise ConfigError(
                f"{override}: there is no earlier step {match[1]}: there are {', '.join(folders) or 'none'}"
            )
        return str(folders[match[1]])

    return REFERENCE.sub(folder, override)
