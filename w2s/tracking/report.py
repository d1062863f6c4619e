"""report.html: one file that shows a run, the stages of a `w2s run`, or several runs, and needs nothing else."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import localtime, strftime
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from w2s.config.naming import flatten
from w2s.errors import UserError
from w2s.tracking.about import BEGUN, read_about
from w2s.tracking.charts import Chart
from w2s.tracking.curves import charts, comparing
from w2s.tracking.files import write_text
from w2s.tracking.history import read_history
from w2s.tracking.meaning import meaning
from w2s.tracking.tables import Cell, Table, cell_text

FILE_NAME = "report.html"
GROUP_FILE = "group.json"


@dataclass(frozen=True)
class Picture:
    """A PNG of the run.

    Attributes:
        name: file name without the ending.
        data: the file in base64.
    """

    name: str
    data: str


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
        pictures: its pictures.
        files: texts that are folded away at the end, by file name.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    meaning: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def write_group(folder: Path, title: str, runs: Sequence[str]) -> None:
    """Notes what the folder of a `w2s run` holds, for `write_report`.

    Args:
        folder: of the group.
        title: heading of its report.
        runs: names of the folders of its runs, in the order to show.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(folder / GROUP_FILE, json.dumps({"title": title, "runs": list(runs)}, indent=1))


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
        title=_group(folder)["title"],
        facts={name: text for name, text in facts.items() if name != "meaning"},
        meaning=facts.get("meaning", ""),
        tables=_tables(folder),
        charts=_compared(runs),
        pictures=_pictures(folder),
    )
    return _write(path, head, [_section(run, known=facts) for run in runs])


def write_comparison(path: Path, runs: Sequence[Path]) -> None:
    """Writes a page with several runs side by side: results, what differs in their settings, curves in one chart.

    Args:
        path: of the page.
        runs: folders of the runs, with different names.

    Raises:
        UserError: the page cannot be written.
    """
    names = [run.name for run in runs]
    results = {run.name: _newest_metrics(run) for run in runs}
    settings = {run.name: _settings(run) for run in runs}
    tables = [
        _side_by_side("Results", {name: _results_only(metrics) for name, metrics in results.items()}),
        _side_by_side("Settings that differ", settings, only_different=True),
        _side_by_side("Facts that differ", {run.name: read_about(run) for run in runs}, only_different=True),
    ]
    head = Section(title=", ".join(names), tables=[table for table in tables if table.rows], charts=_compared(runs))
    _write(path, head, [_section(run) for run in runs])


def meaning_of_run(run: Path) -> str:
    """What the figures of a run mean, in a sentence; nothing where it has not measured anything yet."""
    return meaning(_newest_metrics(run))


def is_group(folder: Path) -> bool:
    """Whether a folder is that of a `w2s run`."""
    return (folder / GROUP_FILE).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that has begun."""
    return (folder / "config.yaml").is_file() or (folder / "result.json").is_file()


def find_runs(names: Sequence[str], root: Path) -> list[Path]:
    """Folders of runs, or of a single `w2s run`, by their paths or their names below `root`.

    Raises:
        UserError: there is no such run.
    """
    found = []
    for name in names:
        path = next((each for each in (Path(name).expanduser(), root / name) if is_group(each) or is_run(each)), None)
        if path is None:
            raise UserError(f"RUN={name} is no run, nor one below {root}: see `ls {root}`")
        found.append(path)
    return found


def runs_of(folder: Path) -> list[Path]:
    """The runs of a group that have begun; a run itself."""
    if not is_group(folder):
        return [folder]
    return [folder / name for name in _group(folder)["runs"] if is_run(folder / name)]


def _group(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / GROUP_FILE).read_text(encoding="utf-8"))
    return content


def _write(path: Path, head: Section, sections: Sequence[Section]) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("w2s.tracking", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = cell_text
    # matplotlib escapes what it writes.
    environment.filters["svg"] = lambda chart, key: Markup(chart.svg(key))
    write_text(path, environment.get_template(FILE_NAME).render(head=head, sections=sections))
    return path


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


def _pictures(folder: Path) -> list[Picture]:
    paths = sorted((folder / "pictures").glob("*.png"))
    return [Picture(path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode("ascii")) for path in paths]


def _compared(runs: Sequence[Path]) -> list[Chart]:
    """Charts with the curves of all runs of a stage."""
    by_stage: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for run in runs:
        by_stage.setdefault(_settings(run).get("stage", ""), {})[run.name] = read_history(run)
    drawn = {stage: comparing(found) for stage, found in by_stage.items()}
    if sum(map(bool, drawn.values())) > 1:
        drawn = {
            stage: [replace(each, title=f"{stage}: {each.title}") for each in found] for stage, found in drawn.items()
        }
    return [chart for found in drawn.values() for chart in found]


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


def _results_only(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The loss and what has a prefix: results are called so, measures of the machine are not."""
    hidden = ("fp8/", "ranks/", "source/", "bad/")
    return {
        name: value
        for name, value in metrics.items()
        if name == "loss" or ("/" in name and not name.startswith(hidden))
    }


def _side_by_side(title: str, columns: Mapping[str, Mapping[str, Any]], *, only_different: bool = False) -> Table:
    """A row for each name, a column for each run."""
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        values = [column.get(name) for column in columns.values()]
        if not only_different or any(value != values[0] for value in values):
            rows.append([name, *(value if isinstance(value, float | None) else str(value) for value in values)])
    return Table(title, ["", *columns], rows)
