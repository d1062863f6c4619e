"""How a stage scales with the number of GPUs, each number in its fastest layout."""

from dataclasses import dataclass, fields

from w2s.errors import UserError
from w2s.planning.plan import Plan, find_plans
from w2s.planning.request import Request
from w2s.planning.time.cards import card
from w2s.planning.time.duration import StepTime

BEND = 0.8
"""Samples a second of a GPU, against those of the fewest GPUs, below which scaling counts as bent."""


@dataclass(frozen=True)
class Point:
    """The fastest layout on a number of GPUs."""

    gpus: int
    plan: Plan | None
    """None where nothing fits."""
    efficiency: float | None
    """Samples a second of a GPU, as a fraction of those on the fewest GPUs that suffice."""


@dataclass(frozen=True)
class Scaling:
    """The step on ever more GPUs."""

    points: list[Point]
    bend: int | None
    """The first number of GPUs with an efficiency below `BEND`."""
    reason: str | None
    """The part of the step, in its share of the time, that has grown most from the fewest GPUs to the last."""


def simulate(request: Request, stage: str, most: int) -> Scaling:
    """Plan a stage on 8, 16, 32 ... GPUs up to `most`.

    Raises:
        ConfigError: the overrides are wrong.
        UserError: nothing fits on any of these numbers.
    """
    numbers = [*(8 * 2**power for power in range(most.bit_length()) if 8 * 2**power < most), most]
    fastest = {gpus: _fastest(request, stage, gpus) for gpus in numbers}
    fitting = [plan for plan in fastest.values() if plan]
    if not fitting:
        find_plans(request.config(stage, most), card(request.card), most, request.fixed)
    first, last = fitting[0], fitting[-1]

    def grown(part: str) -> float:
        shares = [getattr(plan.time, part) / plan.seconds for plan in (first, last)]
        return float(shares[1] - shares[0])

    points = [Point(gpus, plan, _speed(plan) / _speed(first) if plan else None) for gpus, plan in fastest.items()]
    bend = next((point.gpus for point in points if point.efficiency is not None and point.efficiency < BEND), None)
    reason = max((part.name for part in fields(StepTime)), key=grown) if len(fitting) > 1 else None
    return Scaling(points, bend, reason)


def _fastest(request: Request, stage: str, gpus: int) -> Plan | None:
    config = request.config(stage, gpus)
    try:
        return find_plans(config, card(request.card), gpus, request.fixed).fastest[0]
    except UserError:
        return None


def _speed(plan: Plan) -> float:
    return plan.samples_per_second / plan.gpus
