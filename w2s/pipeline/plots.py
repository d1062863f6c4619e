"""Pictures of a pipeline with seeds: the curves of training, and the results with every seed as a dot."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from w2s.files import writing
from w2s.pipeline.comparison import LEDGERS, Point, points, trunk_on_the_way
from w2s.pipeline.results import Results, Run, on_the_way, trainings
from w2s.pipeline.steps import ancestors
from w2s.tracking.headlines import Reading, readings

COSINES = tuple(f"test/{kind}_cosine" for kind in ("masked", "visible", "all", "unmasked"))
"""What a masked stage measures of its predictions, by the patches that they are of."""

CURVES = {
    "mim": ("loss", *COSINES),
    "clip": ("loss", "zero_shot/top1", "zero_shot/top5"),
}
"""Metrics whose curves are drawn, by stage."""

BASELINES = dict.fromkeys(COSINES, "test/constant_cosine")
"""What is drawn dotted beside a metric, in the colour of its curve."""

_DPI = 130
_PANEL = 4.2, 3.1
"""Inches of a panel."""

Place = Callable[[Run, int], float]
"""Takes a run and the samples that it has seen, returns where on the horizontal axis that is."""


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw all pictures of a pipeline.

    Returns:
        Their paths.

    Raises:
        UserError: a file cannot be written.
    """
    samples = "training samples of the stage", lambda run, seen: seen
    compute = "training compute of all stages, TFLOP", _compute(results)
    pictures = {
        "first_stage": _curves(results, "mim", *samples),
        "contrastive_by_samples": _curves(results, "clip", *samples),
        "contrastive_by_compute": _curves(results, "clip", *compute),
        "results": _dots(results),
        "by_compute": _by_compute(results),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            with writing(folder / f"{name}.png") as path:
                figure.savefig(path, dpi=_DPI)
            paths.append(path)
    return paths


def _compute(results: Results) -> Place:
    """Where a run stands in TFLOP, those of all that it builds on before it."""

    def place(run: Run, seen: int) -> float:
        chain = ancestors(results.pipeline, run.task.step)
        same_seed = [other for step in chain for other in results.of(step) if other.task.seed == run.task.seed]
        since = seen - run.begins_at * run.config.train.global_batch
        return (sum(other.flops for other in trainings(same_seed)[:-1]) + run.flops * since / run.samples) / 1e12

    return place


def _curves(results: Results, stage: str, label: str, place: Place) -> Figure | None:
    """A panel for each metric of a stage's curves; None where no step has any."""
    steps = [step for step in results.pipeline.steps if step.stage == stage]
    curves_of = {
        metric: {step.name: curve for step in steps if len(curve := _curve(results.of(step), metric, place)) > 1}
        for metric in CURVES[stage]
    }
    panels = {metric: curves for metric, curves in curves_of.items() if curves}
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    colours = {step.name: f"C{index}" for index, step in enumerate(steps)}
    for panel, (metric, curves) in zip(axes, panels.items(), strict=True):
        for name, curve in curves.items():
            places, lows, means, highs = zip(*curve, strict=True)
            panel.plot(places, means, color=colours[name], linewidth=1.4, label=name)
            panel.fill_between(places, lows, highs, color=colours[name], alpha=0.15, linewidth=0)
            if metric in BASELINES and (constant := _curve(results.named(name), BASELINES[metric], place)):
                panel.plot(*list(zip(*constant, strict=True))[::2], color=colours[name], linewidth=1.0, linestyle=":")
        panel.set_title(metric, fontsize=10, loc="left")
        panel.set_xlabel(label, fontsize=8)
        panel.legend(fontsize=8, frameon=False)
    return figure


def _curve(runs: Sequence[Run], metric: str, place: Place) -> list[tuple[float, float, float, float]]:
    """Place, smallest, mean and greatest value over the seeds, wherever every seed has one."""
    return [
        (place(runs[0], samples), min(values), mean(values), max(values))
        for samples, values in on_the_way(runs, metric).items()
    ]


def _by_compute(results: Results) -> Figure | None:
    """A panel for each ledger: what each training reaches over what it costs; trainings of one arm are joined.

    Thin lines are trunks on their way, whose rate has not been lowered yet.
    """
    compare = results.pipeline.compare
    if compare is None:
        return None
    arms: dict[str, list[Point]] = {}
    for point in points(results, compare):
        arms.setdefault(point.arm, []).append(point)
    figure, axes = _panels(len(LEDGERS))
    for ledger, (panel, title) in enumerate(zip(axes, LEDGERS, strict=True)):
        for index, (arm, of_arm) in enumerate(arms.items()):
            cost = [point.flops[ledger] / 1e12 for point in of_arm]
            colour = "0.2" if arm == compare.baseline else f"C{index % 10}"
            if way := trunk_on_the_way(results, compare, arm, ledger):
                panel.plot(*zip(*way, strict=True), color=colour, linewidth=0.7, alpha=0.6)
            panel.plot(cost, [mean(point.values) for point in of_arm], "o-", markersize=3, label=arm, color=colour)
            for where, point in zip(cost, of_arm, strict=True):
                panel.plot([where] * len(point.values), point.values, ".", markersize=2.5, alpha=0.5, color=colour)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("training compute, TFLOP", fontsize=8)
        panel.set_ylabel(compare.metric, fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _dots(results: Results) -> Figure | None:
    """A panel for each headline of the evaluated steps: a dot for each seed, a bar at their mean, chance as a line."""
    steps = [step for step in results.pipeline.steps if step.stage == "eval"]
    readings_of = {step.name: [list(readings(run.metrics)) for run in results.of(step)] for step in steps}
    labels = dict.fromkeys(each.label for runs in readings_of.values() for run in runs for each in run)
    if not labels:
        return None
    figure, axes = _panels(len(labels))
    for panel, label in zip(axes, labels, strict=True):
        for place, runs in enumerate(readings_of.values()):
            _dots_at(panel, place, [each for run in runs for each in run if each.label == label])
        panel.set_title(label, fontsize=10, loc="left")
        panel.set_xticks(range(len(readings_of)), list(readings_of), fontsize=8, rotation=30, ha="right")
        panel.set_xlim(-0.5, len(readings_of) - 0.5)
        panel.set_ylim(bottom=0)
    return figure


def _dots_at(panel: Axes, place: int, seeds: Sequence[Reading]) -> None:
    if not seeds:
        return
    values = [each.value for each in seeds]
    panel.plot([place] * len(values), values, "o", color=f"C{place}", markersize=4, alpha=0.8)
    panel.hlines(mean(values), place - 0.3, place + 0.3, color=f"C{place}", linewidth=2)
    if "chance" in seeds[0].baselines:
        panel.axhline(seeds[0].baselines["chance"], color="0.5", linestyle=":", linewidth=1)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows of at most three."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    for panel in axes:
        panel.grid(True, alpha=0.15, linewidth=0.6)
        panel.tick_params(labelsize=8, length=0)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
