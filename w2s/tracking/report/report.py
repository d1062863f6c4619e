"""report.html: one file that shows a run, the stages of a `w2s run`, or several runs, and needs nothing else."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import localtime, strftime
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from w2s.config.naming import flatten
from w2s.files import write_text
from w2s.tracking.about import BEGUN, read_about
from w2s.tracking.history import read_history
from w2s.tracking.report.charts import Chart, bokeh_script, charts, comparing
from w2s.tracking.report.meaning import meaning
from w2s.tracking.run_group import by_label, is_group, runs_of, title_of
from w2s.tracking.tables import Cell, Table, cell_text

FILE_NAME = "report.html"


@dataclass(frozen=True)
class Section:
    """A run, or what several have in common.

    Attributes:
        title: name of the folder.
        facts: what it is, text by name.
        meaning: what its figures mean.
        tables: its tables.
        charts: its curves.
        figures: metrics that did not change.
        pictures: its PNGs in base64, by name.
        files: texts that are folded away at the end, by file name.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    meaning: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run or of a `w2s run`, from the files in its folder, as far as they are there.

    Args:
        folder: of the run.
        out: the page; None writes report.html into the folder.

    Returns:
        The path of the report.

    Raises:
        UserError: the file cannot be written.
    """
    path = out or folder / FILE_NAME
    if not is_group(folder):
        return _write(path, _section(folder), [])
    runs, facts = runs_of(folder), read_about(folder)
    head = Section(
        title=title_of(folder),
        facts={name: text for name, text in facts.items() if name != "meaning"},
        meaning=facts.get("meaning", ""),
        tables=_tables(folder),
        charts=_compared({run.name: run for run in runs}),
        pictures=_pictures(folder),
    )
    return _write(path, head, [_section(run, known=facts) for run in runs])


def write_comparison(path: Path, runs: Sequence[Path]) -> None:
    """Writes a page with several runs side by side: results, what differs in their settings, curves in one chart.

    Args:
        path: of the page.
        runs: folders of the runs.

    Raises:
        UserError: the page cannot be written.
    """
    labelled = by_label(runs)
    columns = {
        "Results": {name: _results(run) for name, run in labelled.items()},
        "Settings that differ": _different({name: _settings(run) for name, run in labelled.items()}),
        "Facts that differ": _different({name: read_about(run) for name, run in labelled.items()}),
    }
    tables = [_side_by_side(title, each) for title, each in columns.items()]
    head = Section(", ".join(labelled), tables=[table for table in tables if table.rows], charts=_compared(labelled))
    _write(path, head, [replace(_section(run), title=name) for name, run in labelled.items()])


def meaning_of_run(run: Path) -> str:
    """What the figures of a run mean, in a sentence; nothing where it has not measured anything yet."""
    return meaning(_newest_metrics(run))


def _write(path: Path, head: Section, sections: Sequence[Section]) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("w2s.tracking.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = cell_text
    environment.filters["breakable"] = _breakable
    bokeh = Markup(bokeh_script()) if any(section.charts for section in (head, *sections)) else ""
    write_text(path, environment.get_template(FILE_NAME).render(head=head, sections=sections, bokeh=bokeh))
    return path


def _breakable(text: str) -> Markup:
    """A text whose names and paths a narrow page may break behind `/` and `_`."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(text))))


def _section(run: Path, known: Mapping[str, str] | None = None) -> Section:
    """What the page shows of a run, without the facts that are known from above."""
    records = read_history(run)
    drawn, figures = charts(records)
    paths = [*sorted(run.glob("*.yaml")), run / "environment.txt"]
    return Section(
        title=run.name,
        facts={name: text for name, text in _facts(run, records).items() if (known or {}).get(name) != text},
        meaning=meaning_of_run(run),
        tables=_tables(run),
        charts=drawn,
        figures=figures,
        pictures=_pictures(run),
        files={path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()},
    )


def _facts(run: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is known of a run, with how far it has come."""
    facts = read_about(run)
    if records:
        finished = "finished" if (run / "result.json").is_file() else "not finished"
        facts["state"] = f"{finished}, step {records[-1]['step']:,}{_moment(records[-1])}"
    first = ("stage", "state", BEGUN, "command", "teacher", "parameters", "checkpoint")
    return {name: facts[name] for name in (*first, *facts) if name in facts}


def _moment(record: Mapping[str, Any]) -> str:
    """When a line was logged; a damaged one may say anything."""
    try:
        return strftime(", last logged %Y-%m-%d %H:%M:%S", localtime(record["time"]))
    except (LookupError, TypeError, ValueError, OverflowError, OSError):
        return ""


def _tables(folder: Path) -> list[Table]:
    return [Table.load(path) for path in sorted((folder / "tables").glob("*.json"))]


def _pictures(folder: Path) -> dict[str, str]:
    paths = sorted((folder / "pictures").glob("*.png"))
    return {path.stem.replace("_", " "): base64.b64encode(path.read_bytes()).decode("ascii") for path in paths}


def _compared(runs: Mapping[str, Path]) -> list[Chart]:
    """Charts with the curves of all runs of a stage."""
    by_stage: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, run in runs.items():
        by_stage.setdefault(_settings(run).get("stage", ""), {})[name] = read_history(run)
    drawn = [(stage, chart) for stage, histories in by_stage.items() for chart in comparing(histories)]
    if len({stage for stage, _ in drawn}) > 1:
        return [replace(chart, title=f"{stage}: {chart.title}") for stage, chart in drawn]
    return [chart for _, chart in drawn]


def _settings(run: Path) -> dict[str, Any]:
    """A run's configuration by key; nothing where it cannot be read."""
    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flatten(content) if isinstance(content, dict) else {}


def _newest_metrics(run: Path) -> dict[str, float | None]:
    """The last value of each metric."""
    newest: dict[str, float | None] = {}
    for record in read_history(run):
        newest |= record
    return newest


def _results(run: Path) -> dict[str, float | None]:
    """A run's loss and the metrics with a prefix: results are called so, measures of the machine are not."""
    hidden = ("fp8/", "ranks/", "source/", "bad/")
    return {
        name: value
        for name, value in _newest_metrics(run).items()
        if name == "loss" or ("/" in name and not name.startswith(hidden))
    }


def _different(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is not the same in all columns."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    first = next(iter(columns.values()))
    kept = [name for name in names if any(column.get(name) != first.get(name) for column in columns.values())]
    return {title: {name: column[name] for name in kept if name in column} for title, column in columns.items()}


def _side_by_side(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each name, a column for each run."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    return Table(
        title, ["", *columns], [[name, *(_cell(each.get(name)) for each in columns.values())] for name in names]
    )


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, float) else str(value)
