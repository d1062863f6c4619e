"""Running a pipeline: what has no result yet, below one MLflow run; tables, pictures and a report at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from w2s.checkpoint.find import is_finished
from w2s.config.checks import check, check_settings
from w2s.config.load import to_yaml
from w2s.config.naming import run_folder
from w2s.files import write_text
from w2s.launch import launch_stage
from w2s.pipeline.parent import headline_means, parent_params, parent_run
from w2s.pipeline.plots import draw
from w2s.pipeline.result_tables import meaning_of, tables
from w2s.pipeline.results import Results, Run, TrialOutcome
from w2s.pipeline.shards_of_steps import find_shards
from w2s.pipeline.steps import load_pipeline
from w2s.pipeline.tasks import Plan, Task
from w2s.processes.host import prepare_cuda
from w2s.tracking.about import About
from w2s.tracking.console import say
from w2s.tracking.mlflow.run import MlflowRun, stored_run_id
from w2s.tracking.report.report import write_report
from w2s.tracking.run_group import write_group
from w2s.tracking.tables import Table


def run_pipeline(name: str, overrides: Sequence[str], *, ranks: int, fresh: bool, restarts: int = 0) -> Path:
    """Run the steps that have no result yet, and print the tables of all.

    The folder of the group then holds report.html and `tables/*.md`, and for a pipeline with seeds `pictures/*.png`.

    Args:
        name: a file of `configs/run`, or a path that ends in `.yaml`.
        overrides: `key=value` for every step, `STEP:key=value` for one.
        ranks: processes of each step.
        fresh: start a new group of runs, also where there is one of the same configuration.
        restarts: times that the ranks of a step are started again when one has failed.

    Returns:
        The path of the report.

    Raises:
        ConfigError: for a pipeline or an override that cannot be.
        DataError: for shards that a step would not find.
        W2SError: from the step that failed.
    """
    plan = Plan(load_pipeline(name), overrides, fresh=fresh)
    configs = plan.configs()
    for config in configs:
        check(config, ranks, ranks)
    find_shards([config for config in configs if not is_finished(run_folder(config))])
    console = Console()
    about = About(plan.folder, {"pipeline": name}, resumed=True)
    write_group(plan.folder, plan.pipeline.title, [task.name for task in plan.tasks()])
    given = parent_params(name, plan)
    with parent_run(plan.tracking, plan.folder, tags=about.tags, params=given) as parent:
        if parent.page:
            say(console, f"MLflow: {parent.page}")
        results, choices = _Runner(plan, ranks, restarts, parent, console).run()
        shown, meaning = tables(results, choices), meaning_of(results)
        about.note({"meaning": meaning})
        said = [meaning, *(table.to_markdown() for table in shown.values())]
        parent.note({"mlflow.note.content": "\n\n".join(part for part in said if part)})
        files = _write_tables(shown, plan.folder / "tables")
        files += draw(results, plan.folder / "pictures") if plan.pipeline.seeds else []
        report = write_report(plan.folder)
        for path in [report, *files]:
            parent.artifact(path)
    for table in shown.values():
        console.print(table.to_rich())
    if meaning:
        say(console, meaning)
    say(console, f"report: {report}")
    for warning in parent.warnings():
        say(console, f"warning: {warning}")
    return report


def _write_tables(shown: Mapping[str, Table], folder: Path) -> list[Path]:
    """Keep each table for the report, and as Markdown, whose paths are returned."""
    files = []
    for name, table in shown.items():
        table.save(folder / f"{name}.json")
        files.append(folder / f"{name}.md")
        write_text(files[-1], table.to_markdown())
    return files


def pipeline_yaml(name: str, overrides: Sequence[str]) -> str:
    """The configuration of every run, a YAML document each.

    Args:
        name: as in `run_pipeline`.
        overrides: as there.

    Raises:
        ConfigError: for a pipeline or an override that cannot be.
    """
    configs = Plan(load_pipeline(name), overrides, fresh=False).configs()
    for config in configs:
        check_settings(config)
    return "---\n".join(f"# {config.run.name}: w2s stage {config.stage}\n{to_yaml(config)}" for config in configs)


@dataclass(frozen=True)
class _Runner:
    """Runs what has no result yet."""

    plan: Plan
    ranks: int
    restarts: int
    parent: MlflowRun
    """The MLflow run above all."""
    console: Console

    def run(self) -> tuple[Results, list[TrialOutcome]]:
        """All runs in order; a step's trials come before its first run."""
        choices: dict[str, TrialOutcome] = {}
        runs = []
        for task in self.plan.tasks():
            choice = self.plan.choice(task.step)
            values = {name: each.value for name, each in choices.items()}
            if choice is not None and task.step.name not in choices:
                trials = [self._run(trial, values) for trial in self.plan.trials(task.step)]
                chosen = choices[task.step.name] = TrialOutcome(task.step, choice, trials)
                values[task.step.name] = chosen.value
                self.parent.note({}, {f"{task.step.name}.{choice.key}": chosen.value})
                say(self.console, f"{task.step.name}: {choice.key}={chosen.value} has the best {choice.by}")
            runs.append(self._run(task, values))
            of_step = [run for run in runs if run.task.step is task.step]
            self.parent.log(headline_means(of_step), len(of_step))
        return Results(self.plan.pipeline, runs), list(choices.values())

    def _run(self, task: Task, chosen: dict[str, str]) -> Run:
        config = self.plan.config(task, chosen)
        folder = run_folder(config)
        if is_finished(folder):
            say(self.console, f"{task.name}: finished before, in {folder}")
        else:
            say(self.console, f"{task.name}: w2s stage {config.stage}, in {folder}")
            child = replace(config.tracking, parent_run=self.parent.run_id or "")
            prepare_cuda(config.parallel.tensor, config.train.deterministic)
            launch_stage(replace(config, tracking=child), self.ranks, self.restarts)
        if (child_run := stored_run_id(folder)) is not None:
            self.parent.adopt(child_run)
        return Run(task, config, self.plan.begins_at(task, config, chosen))
