"""Trainings compared by what they reach and by what they cost, once with their teachers counted and once without."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from w2s.pipeline.results import Results, chain_costs, on_the_way, spread
from w2s.pipeline.steps import Comparison, Step
from w2s.tracking.tables import Cell, Table

LEDGERS = ("the teacher exists", "the teacher is counted")


@dataclass(frozen=True)
class Point:
    """A finished training of some length."""

    step: Step
    values: Sequence[float]
    """The metric, in the order of the seeds."""
    flops: tuple[float, float]
    """Model FLOPs of all that it builds on, by ledger."""

    @property
    def arm(self) -> str:
        """What trainings that differ in length alone have in common."""
        return self.step.trunk or self.step.name


def points(results: Results, compare: Comparison) -> list[Point]:
    """Every training that has the metric, in the order of the steps; of a trunk its lengths alone."""
    measured = []
    for step in results.pipeline.steps:
        values = [run.metrics.get(compare.metric) for run in results.of(step)]
        known = [value for value in values if value is not None]
        if step.stage != "eval" and not step.budgets and len(known) == len(values):
            exists = {step.name, step.trunk} & set(compare.exists)
            beside = 0.0 if exists else chain_costs(results, step, compare.exists)[0].flops
            measured.append(Point(step, known, (beside, chain_costs(results, step)[0].flops)))
    return measured


def trunk_on_the_way(results: Results, compare: Comparison, arm: str, ledger: int) -> list[tuple[float, float]]:
    """TFLOP and mean of the metric wherever a trunk was measured with every seed; nothing where it costs nothing."""
    runs, counted = results.named(arm), ledger == 1
    if not (runs and runs[0].task.step.budgets) or (arm in compare.exists and not counted):
        return []
    step = runs[0].task.step
    before = chain_costs(results, step, () if counted else compare.exists)[0].flops - runs[0].flops
    per_sample = runs[0].flops / runs[0].samples
    measured = on_the_way(runs, compare.metric)
    return [((before + per_sample * samples) / 1e12, mean(values)) for samples, values in measured.items()]


def rival(point: Point, among: Sequence[Point], ledger: int) -> Point | None:
    """The shortest of the trainings `among` that cost no less than `point`; None where all are shorter."""
    enough = [other for other in among if other.flops[ledger] >= point.flops[ledger] * (1 - 1e-6)]
    return min(enough, key=lambda other: other.flops[ledger], default=None)


def comparison(results: Results, compare: Comparison) -> Table:
    """A row for each training: what it reaches, what it costs, and by how much it is ahead at no less compute."""
    measured = points(results, compare)
    baseline = [point for point in measured if point.arm == compare.baseline]
    rows = [
        [point.step.name, spread(point.values), *_against(point, baseline, 0), *_against(point, baseline, 1)]
        for point in measured
    ]
    columns = [f"{what}, {ledger}" for ledger in LEDGERS for what in ("TFLOP", "ahead of", "by", "by seed")]
    return Table(f"{compare.metric} by compute", ["training", compare.metric, *columns], rows)


def _against(point: Point, baseline: Sequence[Point], ledger: int) -> list[Cell]:
    cost: Cell = f"{point.flops[ledger] / 1e12:.4g}"
    other = rival(point, baseline, ledger)
    if other is None or point.arm == other.arm:
        return [cost, "", "", ""]
    ahead = [ours - theirs for ours, theirs in zip(point.values, other.values, strict=True)]
    return [cost, other.step.name, spread(ahead), by_seed(ahead)]


def by_seed(values: Sequence[float]) -> str:
    """Every value with its sign, in the order of the seeds."""
    return ", ".join(f"{value:+.4f}" for value in values)
