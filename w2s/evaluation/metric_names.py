"""Names of metrics: of a kind of measure, of a test set, of a teacher."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def under(prefix: str, metrics: Mapping[str, T]) -> dict[str, T]:
    """Metrics with a prefix and a slash before each name."""
    return {f"{prefix}/{metric}": value for metric, value in metrics.items()}


def of_sets(measured: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Metrics of test sets, or of teachers, under their names (`openmoji/zero_shot/top1`); no name adds none."""
    parts = [under(name, metrics) if name else metrics for name, metrics in measured.items()]
    return {metric: value for part in parts for metric, value in part.items()}
