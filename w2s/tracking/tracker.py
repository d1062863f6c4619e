"""The one object that a run tells what happens: that goes to the terminal, to files, to MLflow and to the report."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from w2s.config.load import to_yaml
from w2s.config.naming import flatten
from w2s.config.sections import Config
from w2s.errors import UserError
from w2s.files import make_folder, write_text
from w2s.redaction import redacted
from w2s.tracking.about import About, as_tags
from w2s.tracking.console import RunConsole
from w2s.tracking.environment import environment_text
from w2s.tracking.history import History, read_history
from w2s.tracking.mlflow.datasets import DataInput
from w2s.tracking.mlflow.run import MlflowRun, Status
from w2s.tracking.tables import Cell, Table


class Tracker:
    """Follows one run. On every rank but the main one each method returns at once and nothing is written.

    Args:
        config: the resolved configuration.
        run_dir: folder of the run.
        main: whether this rank is the one that writes.
        resumed_step: step that the run continues from; 0 for a new one.
        facts: what is known of the run, such as its `teacher`, for about.json and the tags of its MLflow run.

    Raises:
        UserError: the run folder cannot be written.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        main: bool,
        resumed_step: int = 0,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._parts = _Parts(config, run_dir, resumed_step, facts or {}) if main else None
        self._mlflow = self._parts.mlflow if self._parts else None

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, as soon as its store has answered; None without one and on all but the main rank."""
        return self._mlflow.run_id if self._mlflow else None

    def log(self, step: int, samples: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics.

        Args:
            step: optimizer steps done.
            samples: samples seen until then over all ranks.
            metrics: name to value. Measures of training have plain names (`loss`, `grad_norm`, `lr`), results a prefix
                (`zero_shot/top1`).
        """
        if self._parts:
            self._parts.show_page()
            self._parts.history.append(step, samples, dict(metrics))
            self._parts.console.log(step, metrics)
            self._parts.mlflow.log(metrics, step, samples)

    def rewind(self, step: int) -> None:
        """Forgets what was logged after `step`: those steps are done again.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if self._parts:
            self._parts.history.flush()
            self._parts.history = History(self._run_dir, step)
            self._parts.mlflow.rewind()

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._parts:
            self._parts.console.print(text)

    def note(self, **facts: str) -> None:
        """Adds facts of the run, such as its newest `checkpoint`, to about.json and to the tags of its MLflow run."""
        if self._parts:
            with suppress(UserError):  # a full disk ends no run
                self._parts.about.note(facts)
            self._parts.mlflow.note(as_tags(facts))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], title: str) -> None:
        """Prints a table and keeps it as tables/NAME.json, for the report.

        Raises:
            UserError: the file cannot be written.
        """
        if self._parts:
            table = Table(title, list(columns), [list(row) for row in rows])
            table.save(self._run_dir / "tables" / f"{name}.json")
            self._parts.console.print(table.to_rich())

    def results(self, metrics: Mapping[str, float], title: str) -> None:
        """Shows and keeps the table of a finished stage's metrics.

        Raises:
            UserError: the file cannot be written.
        """
        self.table("results", ["measure", "value"], [[name, value] for name, value in metrics.items()], title)

    def picture(self, name: str, draw: Callable[[Path], object]) -> None:
        """Lets `draw` save a picture as pictures/NAME.png, for the report.

        Raises:
            UserError: the folder cannot be made.
        """
        if self._parts:
            path = self._run_dir / "pictures" / f"{name}.png"
            make_folder(path.parent)
            draw(path)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Uploads a file to MLflow, into a folder of the run's artifacts where one is given."""
        if self._parts:
            self._parts.mlflow.artifact(path, folder)

    def inputs(self, inputs: Sequence[DataInput]) -> None:
        """Notes in MLflow which data sets the run reads."""
        if self._parts:
            self._parts.mlflow.inputs(inputs)

    def finish(self, status: Status) -> None:
        """Writes the report, uploads what a person may look for later, ends the MLflow run and prints the warnings.

        Raises:
            UserError: metrics.jsonl or the report cannot be written.
        """
        if self._parts is None:
            return
        from w2s.tracking.report.report import meaning_of_run, write_report  # not before the first step

        parts, self._parts = self._parts, None
        parts.show_page()
        parts.console.close()
        try:
            parts.history.flush()
            report = write_report(self._run_dir)
            parts.console.print(f"report: {report}")
            if meaning := meaning_of_run(self._run_dir):
                parts.mlflow.note({"mlflow.note.content": meaning})
            for path in [*self._run_dir.glob("*.yaml"), self._run_dir / "environment.txt", report]:
                parts.mlflow.artifact(path)
            for folder in ("pictures", "tables"):
                for path in sorted((self._run_dir / folder).glob("*.*")):
                    parts.mlflow.artifact(path, folder)
        finally:
            parts.mlflow.end(status)
            for warning in parts.mlflow.warnings():
                parts.console.print(f"warning: {warning}")


class _Parts:
    """What the main rank has and the others have not."""

    def __init__(self, config: Config, run_dir: Path, resumed_step: int, facts: Mapping[str, str]) -> None:
        _write_config(run_dir, to_yaml(config), resumed_step)
        write_text(run_dir / "environment.txt", environment_text())
        self.history = History(run_dir, resumed_step)
        self.console = RunConsole(config.stage, 0 if config.stage == "eval" else config.train.steps, resumed_step)
        self.about = About(run_dir, {"stage": config.stage, **facts}, resumed=resumed_step > 0)
        self.mlflow = MlflowRun(
            config.tracking,
            Path(config.run.root).expanduser(),
            run_dir.name,
            tags=self.about.tags,
            params=flatten(redacted(asdict(config))),
            parent_run_id=config.tracking.parent_run or None,
            folder=run_dir,
            history=read_history(run_dir),
        )
        self._page_shown = False

    def show_page(self) -> None:
        """Tells where the run is in MLflow, once that is known."""
        if not self._page_shown and (page := self.mlflow.page):
            self.console.print(f"MLflow: {page}")
            self._page_shown = True


def _write_config(run_dir: Path, text: str, resumed_step: int) -> None:
    """Keeps the configuration that the run began with; one that it continues with and that differs goes beside it."""
    path = run_dir / "config.yaml"
    if resumed_step == 0 or not path.is_file():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        write_text(run_dir / f"config.resumed-{resumed_step}.yaml", text)
