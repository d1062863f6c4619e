import pytest

from w2s.data.shards.raw_sample import Skipped
from w2s.data.stream.tolerance import Tolerance
from w2s.errors import DataError

SAMPLE = Skipped("key", "shard.tar", "caption is missing")


def skip(tolerance: Tolerance, times: int) -> None:
    for _ in range(times):
        tolerance.skip(SAMPLE)


def test_more_than_the_fraction_of_1000_stops() -> None:
    tolerance = Tolerance(0.05)
    skip(tolerance, 50)
    with pytest.raises(DataError, match=r"51 of the last 51 samples .* 51 of them for 'caption is missing'.*0.05"):
        tolerance.skip(SAMPLE)


def test_only_the_last_1000_count() -> None:
    tolerance = Tolerance(0.05)
    skip(tolerance, 50)
    for _ in range(950):
        tolerance.good()
    skip(tolerance, 50)
    with pytest.raises(DataError, match="51 of the last 1000"):
        for _ in range(949):
            tolerance.good()
        tolerance.skip(SAMPLE)
        tolerance.good()
        skip(tolerance, 1)


def test_nothing_but_bad_samples_always_stops() -> None:
    tolerance = Tolerance(1.0)
    skip(tolerance, 999)
    with pytest.raises(DataError, match="1000 of the last 1000"):
        tolerance.skip(SAMPLE)


def test_a_fraction_of_zero_allows_none() -> None:
    with pytest.raises(DataError, match="1 of the last 1 samples"):
        Tolerance(0.0).skip(SAMPLE)
