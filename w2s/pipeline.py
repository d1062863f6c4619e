"""`w2s run`: several stages in order, one MLflow run above them, one table and one report at the end."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from w2s.config.checks import check
from w2s.config.fields import nearest
from w2s.config.load import load, read_document
from w2s.config.naming import digest, run_folder
from w2s.config.sections import Config
from w2s.errors import ConfigError
from w2s.launch import launch, run_stage
from w2s.tracking.mlflow_run import parent_run
from w2s.tracking.report import write_group_report
from w2s.tracking.tables import Cell, Table

_OWN_KEYS = ("run.name", "run.group", "tracking.parent_run")


@dataclass(kw_only=True)
class Step:
    """One stage of a pipeline."""

    name: str
    """Name of the step, and of its folder."""
    stage: str
    """The stage that it runs."""
    overrides: list[str] = field(default_factory=list)
    """As on the command line of `w2s stage`; `{NAME}` stands for the folder of an earlier step."""
    beside: str = ""
    """Step whose figures stand beside this one's in the final table."""


@dataclass(kw_only=True)
class Pipeline:
    """A file of `configs/run`."""

    title: str
    """Heading of the report."""
    experiment: str = "w2s"
    """MLflow experiment of all steps."""
    steps: list[Step]
    """What is run, in this order."""


@dataclass(frozen=True)
class Headline:
    """A metric of the final table, and the metrics that it is compared with."""

    label: str
    metric: str
    baselines: Mapping[str, str]


HEADLINES = (
    Headline(
        "masked cosine, neighbours",
        "neighbours/masked_cosine",
        {"constant": "neighbours/constant_cosine"},
    ),
    Headline("masked cosine, test", "test/masked_cosine", {"constant": "test/constant_cosine"}),
    Headline(
        "k-NN top-1",
        "knn/top1",
        {"random": "knn_random/top1", "teacher": "knn_teacher/top1", "chance": "knn/chance_top1"},
    ),
    Headline("zero-shot top-1", "zero_shot/top1", {"chance": "zero_shot/chance_top1"}),
    Headline("zero-shot top-5", "zero_shot/top5", {"chance": "zero_shot/chance_top5"}),
)


def run_pipeline(name: str, overrides: Sequence[str], *, ranks: int, fresh: bool) -> Path:
    """Run the steps that have no result yet, and print the table of all.

    Args:
        name: a file of `configs/run`, or a path that ends in `.yaml`.
        overrides: `key=value` for every step, `STEP:key=value` for one.
        ranks: processes of each step.
        fresh: start a new group of runs, also where there is one of the same configuration.

    Returns:
        The path of the report.

    Raises:
        ConfigError: for a pipeline or an override that cannot be.
        W2SError: from the step that failed.
    """
    pipeline = load_pipeline(name)
    configs = resolve(pipeline, overrides, fresh=fresh)
    for config in configs.values():
        check(config, ranks, ranks)
    group = run_folder(next(iter(configs.values()))).parent
    tracking = next(iter(configs.values())).tracking
    console = Console()
    with parent_run(tracking, group, tags={"w2s.pipeline": name}) as parent:
        for step, config in configs.items():
            if _result_path(config).exists():
                console.print(f"{step}: finished before, in {run_folder(config)}")
                continue
            console.print(f"{step}: w2s stage {config.stage}, in {run_folder(config)}")
            child = replace(config.tracking, parent_run=parent.run_id or "")
            launch(run_stage, replace(config, tracking=child), ranks)
        summary = _summary(pipeline, configs)
        folders = [run_folder(config) for config in configs.values()]
        report = write_group_report(group, pipeline.title, folders, [summary])
        parent.artifact(report)
    console.print(summary.to_rich())
    console.print(f"report: {report}", soft_wrap=True)
    for warning in parent.warnings():
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    return report


def load_pipeline(name: str) -> Pipeline:
    """Read a pipeline.

    Raises:
        ConfigError: when there is none of this name, or the file is not of this form.
    """
    document = read_document("run", name)
    try:
        pipeline = cast(Pipeline, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Pipeline), document)))
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"run/{name}: {error.full_key}: {reason}; see configs/run/default.yaml") from error
    names = [step.name for step in pipeline.steps]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"run/{name}: steps are named {names}: give at least one, each with a name of its own")
    return pipeline


def resolve(pipeline: Pipeline, overrides: Sequence[str], *, fresh: bool) -> dict[str, Config]:
    """The configuration of every step, with its folder in the group of this pipeline.

    The group is named after a digest of all configurations, so that the same command finds it again.
    """
    given = {step.name: [*step.overrides, *_overrides_of(step, pipeline, overrides)] for step in pipeline.steps}
    drafts = {step.name: load(step.stage, given[step.name]) for step in pipeline.steps}
    parts = [f"{name}:{config.stage}:{digest(config)}" for name, config in drafts.items()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    first = next(iter(drafts.values()))
    group = _group_name(Path(first.run.root).expanduser(), f"run-{key}", fresh)
    folders: dict[str, Path] = {}
    configs = {}
    for step in pipeline.steps:
        config = load(step.stage, [_fill(override, folders) for override in given[step.name]])
        config.run.group, config.run.name = group, step.name
        config.tracking.experiment = pipeline.experiment
        folders[step.name] = run_folder(config).absolute()
        configs[step.name] = config
    return configs


def _overrides_of(step: Step, pipeline: Pipeline, overrides: Sequence[str]) -> list[str]:
    """Those of the user's overrides that are meant for a step."""
    own = []
    for override in overrides:
        key, equals, value = override.partition("=")
        target, colon, rest = key.rpartition(":")
        names = [other.name for other in pipeline.steps]
        if colon and target not in names:
            raise ConfigError(
                f"{override}: there is no step {target}: did you mean {nearest(target, names)}? "
                f"The steps are {', '.join(names)}"
            )
        if rest in _OWN_KEYS:
            raise ConfigError(f"{override}: `w2s run` sets {rest} itself: leave it out, or change run.root")
        if target in ("", step.name):
            own.append(f"{rest}{equals}{value}")
    return own


def _group_name(root: Path, base: str, fresh: bool) -> str:
    """The newest group of this name, or one after it: run-1a2b3c4d, run-1a2b3c4d-2, ..."""
    number = 1
    while (root / _numbered(base, number)).exists():
        number += 1
    return _numbered(base, number if fresh else max(1, number - 1))


def _numbered(base: str, number: int) -> str:
    return base if number == 1 else f"{base}-{number}"


def _fill(override: str, folders: Mapping[str, Path]) -> str:
    """An override with the folders of earlier steps in the place of `{NAME}`."""

    def folder(match: re.Match[str]) -> str:
        if match[1] not in folders:
            raise ConfigError(
                f"{override}: there is no earlier step {match[1]}: there are {', '.join(folders) or 'none'}"
            )
        return str(folders[match[1]])

    return re.sub(r"\{([A-Za-z_]\w*)\}", folder, override)


def _result_path(config: Config) -> Path:
    return run_folder(config) / "result.json"


def _summary(pipeline: Pipeline, configs: Mapping[str, Config]) -> Table:
    """The headlines of every step that has some, beside their baselines, and what each step took."""
    results = {name: json.loads(_result_path(config).read_text(encoding="utf-8")) for name, config in configs.items()}
    rows: list[list[Cell]] = []
    for step in pipeline.steps:
        result, other = results[step.name], results.get(step.beside, {"metrics": {}})
        headlines = [_headline(each, result["metrics"], step.beside, other["metrics"]) for each in HEADLINES]
        label, cost = step.name, [f"{result['seconds']:.0f} s", f"{result['peak_memory_gib']:.1f} GiB"]
        for headline in filter(None, headlines):
            rows.append([label, *headline, *cost])
            label, cost = "", ["", ""]
        if label:
            rows.append([label, "", "", "", *cost])
    return Table("Summary", ["step", "metric", "value", "beside", "time", "memory"], rows)


def _headline(
    headline: Headline, metrics: Mapping[str, float], beside: str, others: Mapping[str, float]
) -> list[str] | None:
    if headline.metric not in metrics:
        return None
    baselines = {label: metrics[key] for label, key in headline.baselines.items() if key in metrics}
    if headline.metric in others:
        baselines[beside] = others[headline.metric]
    text = ", ".join(f"{label} {value:.4f}" for label, value in baselines.items())
    return [headline.label, f"{metrics[headline.metric]:.4f}", text]
