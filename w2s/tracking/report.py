"""report.html: one file that shows a run, or the stages of a `w2s run`, and needs nothing else to be looked at."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from w2s.tracking.charts import curve_svg
from w2s.tracking.files import write_text
from w2s.tracking.history import read_history
from w2s.tracking.tables import Table, cell_text

FILE_NAME = "report.html"

_NO_CURVE = ("step", "samples_seen", "time")


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
    """What the report shows of one run.

    Attributes:
        title: name of the run's folder.
        tables: the run's tables.
        pictures: the run's pictures.
        curves: one SVG element for each metric that was logged at two steps or more.
        files: texts that are folded away at the end, by file name.
    """

    title: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    curves: Sequence[Markup]
    files: dict[str, str]


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run's folder, from the files that the tracker left there.

    Returns:
        The path of the report.

    Raises:
        UserError: the file cannot be written.
    """
    return _write(run_dir, run_dir.name, [], [], [_section(run_dir)])


def write_group_report(group_dir: Path, title: str, run_dirs: Sequence[Path], summary: Sequence[Table]) -> Path:
    """Writes report.html for several runs: the summary and the group's pictures first, then each run.

    Args:
        group_dir: folder that the report goes to.
        title: heading of the page.
        run_dirs: folders of the runs, in the order to show.
        summary: tables at the top.

    Returns:
        The path of the report.

    Raises:
        UserError: the file cannot be written.
    """
    return _write(group_dir, title, summary, _pictures(group_dir), [_section(run_dir) for run_dir in run_dirs])


def _write(
    folder: Path, title: str, summary: Sequence[Table], pictures: Sequence[Picture], sections: Sequence[Section]
) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("w2s.tracking", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = cell_text
    page = environment.get_template(FILE_NAME).render(
        title=title, summary=summary, pictures=pictures, sections=sections
    )
    write_text(folder / FILE_NAME, page)
    return folder / FILE_NAME


def _section(run_dir: Path) -> Section:
    paths = [*sorted(run_dir.glob("*.yaml")), run_dir / "environment.txt"]
    return Section(
        title=run_dir.name,
        tables=[Table.load(path) for path in sorted((run_dir / "tables").glob("*.json"))],
        pictures=_pictures(run_dir),
        curves=_curves(run_dir),
        files={path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()},
    )


def _pictures(folder: Path) -> list[Picture]:
    paths = sorted((folder / "pictures").glob("*.png"))
    return [Picture(path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode("ascii")) for path in paths]


def _has_curve(name: str) -> bool:
    # Those of FP8 in every layer are hundreds; the worst of them has a curve.
    return name not in _NO_CURVE and not name.startswith("fp8/")


def _curves(run_dir: Path) -> list[Markup]:
    records = read_history(run_dir)
    names = dict.fromkeys(name for record in records for name in record if _has_curve(name))
    curves = []
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        if len(points) > 1:
            steps, values = zip(*points, strict=True)
            curves.append(
                Markup(curve_svg(f"{run_dir.name} {name}", name, steps, values))
            )  # matplotlib escapes what it writes
    return curves
