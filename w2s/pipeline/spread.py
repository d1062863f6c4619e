"""Figures over the seeds."""

from collections.abc import Sequence
from statistics import mean, stdev


def spread(values: Sequence[float]) -> str:
    """Mean and, of several values, their standard deviation."""
    if not values:
        return ""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def by_seed(values: Sequence[float]) -> str:
    """Every value with its sign, in the order of the seeds."""
    return ", ".join(f"{value:+.4f}" for value in values)
