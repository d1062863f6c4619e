"""Which metrics of a run, or of several, share a chart; the first charts are those that one looks at first."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from w2s.tracking.report.charts import Chart, Curve

Records = Sequence[Mapping[str, Any]]
"""The lines of a metrics.jsonl."""


class Baseline(NamedTuple):
    """What metrics are compared with: its label, and the metrics whose colour it has where one of them is drawn."""

    label: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Metrics that belong together.

    Attributes:
        title: of the chart.
        metrics: label by name.
        baselines: by name.
        compared: whether runs are compared by it; else another group says enough.
    """

    title: str
    metrics: Mapping[str, str]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    compared: bool = True


def _recalls(way: str) -> dict[str, str]:
    return {f"retrieval/{way}_recall_at_{k}": f"at {k}" for k in (1, 5, 10)}


def _classified(title: str, kind: str) -> Group:
    others = {
        f"{kind}_random/top1": "random weights",
        f"{kind}_teacher/top1": "teacher",
        f"{kind}/chance_top1": "chance",
    }
    return Group(title, {f"{kind}/top1": "student"}, {kind + end: Baseline(label) for end, label in others.items()})


def _over_ranks(name: str) -> dict[str, str]:
    return {f"ranks/{name}_{which}": f"{which} of the ranks" for which in ("min", "median", "max")}


_ON_TEST = {
    "test/masked_cosine": "test, masked patches",
    "test/visible_cosine": "test, visible patches",
    "test/all_cosine": "test, all patches",
    "test/unmasked_cosine": "test",
}

BY_TEACHER = (
    Group(
        "cosine with the teacher's features",
        {"cosine": "training", **_ON_TEST},
        {
            "constant_cosine": Baseline("best constant, training", ("cosine",)),
            "test/constant_cosine": Baseline("best constant, test", tuple(_ON_TEST)),
        },
    ),
    Group(
        "cosine with the teacher's summary",
        {"summary_cosine": "training", "test/summary_cosine": "test"},
        {
            "summary_constant_cosine": Baseline("best constant, training", ("summary_cosine",)),
            "test/summary_constant_cosine": Baseline("best constant, test", ("test/summary_cosine",)),
        },
    ),
)
"""Those of the masked stage, for each of several teachers under its name."""

GROUPS = (
    Group("loss", {"loss": "training"}),
    Group("loss of distillation", {"distill_loss": "training"}),
    *BY_TEACHER,
    Group(
        "zero-shot accuracy",
        {f"zero_shot/top{k}": f"top-{k}" for k in (1, 5)},
        {f"zero_shot/chance_top{k}": Baseline(f"chance, top-{k}", (f"zero_shot/top{k}",)) for k in (1, 5)},
    ),
    Group(
        "mean average precision",
        {"zero_shot/mean_average_precision": "student"},
        {"zero_shot/chance_mean_average_precision": Baseline("chance", ("zero_shot/mean_average_precision",))},
    ),
    Group("recall, both ways", _recalls("mean")),
    Group("recall, image to text", _recalls("image_to_text"), compared=False),
    Group("recall, text to image", _recalls("text_to_image"), compared=False),
    _classified("k-NN top-1", "knn"),
    _classified("linear probe top-1", "linear_probe"),
    Group("gradient norm", {"grad_norm": "before clipping"}),
    Group("learning rate", {"lr": "highest"}),
    Group("logit scale", {"logit_scale": "inverse temperature"}),
    Group("samples a second", {"samples_per_second": "all ranks"}),
    Group("seconds per step", {"seconds_per_step": "main rank", **_over_ranks("seconds_per_step")}),
    Group("share of the time spent waiting for data", {"data_wait": "main rank", **_over_ranks("data_wait")}),
    Group("memory, GiB", {"memory_gib": "main rank"}),
)

_MARK = "constant_cosine"
"""What the masked stage reports of every teacher."""
_NO_METRICS = ("step", "samples_seen", "time")


def charts(records: Records) -> tuple[list[Chart], dict[str, float]]:
    """Charts of a run's metrics, and the figures that did not change, by name.

    What was logged at one step alone has no curve.
    """
    records = [_with_cosine(record) for record in records]
    drawn, figures = [], dict[str, float]()
    for group in _groups(_names(records)):
        curves: dict[str, Curve] = {}
        for name, label in group.metrics.items():
            steps, values = _points(records, name, "step")
            if len(steps) < 2:
                continue
            if _does_not_change(values):
                figures[name] = next((value for value in values if value is not None), math.nan)
                continue
            curves[name] = Curve(label, steps, values, len(curves))
        if curves:
            drawn.append(Chart(group.title, [*curves.values(), *_baselines(group, curves, records)]))
    return drawn, figures


def _baselines(group: Group, curves: Mapping[str, Curve], records: Records) -> Iterator[Curve]:
    number = len(curves)
    for name, (label, beside) in group.baselines.items():
        steps, values = _points(records, name, "step")
        if len(steps) > 1:
            partner = next((curves[each] for each in beside if each in curves), None)
            yield Curve(label, steps, values, partner.colour if partner else number, dotted=True)
            number += partner is None


def comparing(runs: Mapping[str, Records]) -> list[Chart]:
    """A chart for each metric that two runs or more have a curve of, over the training samples.

    Args:
        runs: the lines of each run by its name.
    """
    lines = {name: [_with_cosine(record) for record in records] for name, records in runs.items()}
    drawn = []
    groups = _groups(_names(record for records in lines.values() for record in records))
    for group in (group for group in groups if group.compared):
        several = len(group.metrics) > 1
        for metric, label in group.metrics.items():
            lines_of = [(run, _points(records, metric, "samples_seen")) for run, records in lines.items()]
            curves = [
                Curve(run, samples, values, number)
                for number, (run, (samples, values)) in enumerate(lines_of)
                if len(samples) > 1
            ]
            if len(curves) > 1 and not all(_does_not_change(curve.values) for curve in curves):
                name = f"{group.title}: {label}" if several else group.title
                drawn.append(Chart(name, curves, "training samples"))
    return drawn


def _with_cosine(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A line of the masked stage with its cosine, which it leaves out where the loss is the negative cosine."""
    if "constant_cosine" not in record or "cosine" in record or record.get("loss") is None:
        return record
    return {**record, "cosine": -record["loss"]}


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that may have a curve: those of FP8 in every layer are hundreds, the worst of them has one."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name not in _NO_METRICS and not name.startswith("fp8/")]


def _groups(names: Sequence[str]) -> list[Group]:
    """The groups, the sources of the data, and each other metric for itself."""
    teachers = [name.removesuffix(f"/{_MARK}") for name in names if name.endswith(f"/{_MARK}") and name.count("/") == 1]
    groups = [*GROUPS, *(_of_teacher(group, name) for name in teachers for group in BY_TEACHER)]
    grouped = {name for group in groups for name in (*group.metrics, *group.baselines)}
    shares = {name: name.split("/")[1] for name in names if name.startswith("source/") and name.endswith("/share")}
    others = [Group(name, {name: name}) for name in names if name not in grouped and name not in shares]
    return [*groups, Group("share of each source", shares), *others]


def _of_teacher(group: Group, name: str) -> Group:
    """The group of one of several teachers."""

    def under(metrics: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{name}/{metric}" for metric in metrics)

    baselines = {
        f"{name}/{metric}": Baseline(each.label, under(each.beside)) for metric, each in group.baselines.items()
    }
    metrics = dict(zip(under(group.metrics), group.metrics.values(), strict=True))
    return Group(f"{name}: {group.title}", metrics, baselines, group.compared)


def _points(records: Records, name: str, over: str) -> tuple[list[float], list[float | None]]:
    points = [(record.get(over, record["step"]), record[name]) for record in records if name in record]
    return [place for place, _ in points], [value for _, value in points]


def _does_not_change(values: Iterable[float | None]) -> bool:
    """Whether values look the same at three digits."""
    return len({f"{value:.3g}" for value in values if value is not None}) < 2
