"""The charts of a run, or of several: curves that BokehJS draws in the page."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from w2s.tracking.report.metric_groups import Group, groups_of

COLOURS = 7
"""The page has as many colours of curves, `--curve-0` and so on; an eighth curve has that of the first."""
_MOST_POINTS = 600
_NO_METRICS = ("step", "samples_seen", "time")

Records = Sequence[Mapping[str, Any]]
"""The lines of a metrics.jsonl."""


@dataclass(frozen=True)
class Curve:
    """Values over steps or samples.

    Attributes:
        label: what it is, in the legend.
        steps: horizontal values.
        values: vertical values; None leaves a gap.
        colour: index of its colour.
        dotted: whether it is what others are compared with.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]
    colour: int = 0
    dotted: bool = False

    @property
    def variable(self) -> str:
        """The name of its colour in the page's style."""
        return f"--curve-{self.colour % COLOURS}"

    @property
    def is_flat(self) -> bool:
        """Whether its values look the same at three digits."""
        return len({f"{value:.3g}" for value in self.values if value is not None}) < 2

    def data(self) -> dict[str, Any]:
        """What the page's script draws; of many points only some."""
        stride = max(1, math.ceil(len(self.steps) / _MOST_POINTS))
        values = [None if value is None else float(f"{value:.6g}") for value in self.values[::stride]]
        drawn = {"x": self.steps[::stride], "y": values}
        return {"label": self.label, "variable": self.variable, "dotted": self.dotted, **drawn}


@dataclass(frozen=True)
class Chart:
    """Curves that belong together."""

    title: str
    curves: Sequence[Curve]
    over: str = "step"
    """What the horizontal axis is."""

    def data(self) -> dict[str, Any]:
        """What the page's script draws."""
        return {"over": self.over, "curves": [curve.data() for curve in self.curves]}


def charts(records: Records) -> tuple[list[Chart], dict[str, float]]:
    """Charts of a run's metrics, and the figures that did not change, by name.

    What was logged at one step alone has no curve.
    """
    records = [_with_cosine(record) for record in records]
    drawn, figures = [], dict[str, float]()
    for group in groups_of(_names(records)):
        curves: dict[str, Curve] = {}
        for name, label in group.metrics.items():
            curve = _curve(records, name, label, "step", len(curves))
            if curve and curve.is_flat:
                figures[name] = next((value for value in curve.values if value is not None), math.nan)
            elif curve:
                curves[name] = curve
        if curves:
            drawn.append(Chart(group.title, [*curves.values(), *_baselines(group, curves, records)]))
    return drawn, figures


def _baselines(group: Group, curves: Mapping[str, Curve], records: Records) -> Iterator[Curve]:
    unused = len(curves)
    for name, (label, beside) in group.baselines.items():
        partner = next((curves[each] for each in beside if each in curves), None)
        curve = _curve(records, name, label, "step", partner.colour if partner else unused, dotted=True)
        if curve:
            yield curve
            unused += partner is None


def comparing(runs: Mapping[str, Records]) -> list[Chart]:
    """A chart for each metric that two runs or more have a curve of, over the training samples.

    Args:
        runs: the lines of each run by its name.
    """
    lines = {name: [_with_cosine(record) for record in records] for name, records in runs.items()}
    drawn = []
    groups = groups_of(_names(record for records in lines.values() for record in records))
    for group in (group for group in groups if group.compared):
        for metric, label in group.metrics.items():
            each = [_curve(lines[run], metric, run, "samples_seen", index) for index, run in enumerate(lines)]
            curves = [curve for curve in each if curve]
            if len(curves) > 1 and not all(curve.is_flat for curve in curves):
                title = f"{group.title}: {label}" if len(group.metrics) > 1 else group.title
                drawn.append(Chart(title, curves, "training samples"))
    return drawn


def _curve(records: Records, name: str, label: str, over: str, colour: int, *, dotted: bool = False) -> Curve | None:
    """The curve of a metric; None where it has less than two points."""
    points = [(record.get(over, record["step"]), record[name]) for record in records if name in record]
    if len(points) < 2:
        return None
    return Curve(label, [place for place, _ in points], [value for _, value in points], colour, dotted)


def _with_cosine(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A line of the masked stage with its cosine, which it leaves out where the loss is the negative cosine."""
    if "constant_cosine" not in record or "cosine" in record or record.get("loss") is None:
        return record
    return {**record, "cosine": -record["loss"]}


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that may have a curve: those of FP8 in every layer are hundreds, the worst of them has one."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name not in _NO_METRICS and not name.startswith("fp8/")]


def bokeh_script() -> str:
    """BokehJS with its plotting interface: 1.4 MB of JavaScript, which asks the network for nothing."""
    from bokeh.util.paths import bokehjs_path  # only where there is something to draw

    folder = bokehjs_path() / "js"
    return "\n".join((folder / f"{name}.min.js").read_text(encoding="utf-8") for name in ("bokeh", "bokeh-api"))
