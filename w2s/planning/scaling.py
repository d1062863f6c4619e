"""How a stage scales with the number of GPUs, each number in its fastest layout."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from w2s.errors import UserError
from w2s.planning.cards import card
from w2s.planning.duration import StepTime
from w2s.planning.plan import Plan, find_plans
from w2s.planning.request import Request

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
    fastest = {gpus: _fastest(request, stage, gpus) for gpus in _numbers(most)}
    fitting = [plan for plan in fastest.values() if plan]
    if not fitting:
        find_plans(request.config(stage, most), card(request.card), most, request.fixed)
    first = fitting[0]

    def efficiency(plan: Plan | None) -> float | None:
        return None if plan is None else _speed(plan) / _speed(first)

    points = [Point(gpus, plan, efficiency(plan)) for gpus, plan in fastest.items()]
    bend = next((point.gpus for point in points if point.efficiency is not None and point.efficiency < BEND), None)
    return Scaling(points, bend, _grown(first, fitting[-1]) if len(fitting) > 1 else None)


def _numbers(most: int) -> Sequence[int]:
    doubled = [8 * 2**power for power in range(most.bit_length()) if 8 * 2**power < most]
    return [*doubled, most]


def _fastest(request: Request, stage: str, gpus: int) -> Plan | None:
    config = request.config(stage, gpus)
    try:
        return find_plans(config, card(request.card), gpus, request.fixed).fastest[0]
    except UserError:
        return None


def _speed(plan: Plan) -> float:
    return plan.samples_per_second / plan.gpus


def _grown(first: Plan, last: Plan) -> str:
    def growth(name: str) -> float:
        return _share(last, name) - _share(first, name)

    return max((part.name for part in fields(StepTime)), key=growth)


def _share(plan: Plan, name: str) -> float:
    share: float = getattr(plan.time, name) / plan.seconds
    return share
