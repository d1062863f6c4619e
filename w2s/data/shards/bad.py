"""Samples that cannot be used: why one is skipped, and when there are too many of them."""

from collections import Counter, deque
from dataclasses import dataclass

from w2s.errors import DataError

WINDOW = 1000
"""Drawn samples over which the fraction of bad ones is taken."""


class BadSample(Exception):
    """A sample that is skipped. The message is a short reason, the same for all samples with the same defect."""


@dataclass(frozen=True)
class Skipped:
    """The record of a skipped sample."""

    key: str
    shard: str
    reason: str


class Tolerance:
    """Counts good and bad samples and refuses to continue when too many of the last 1,000 were bad."""

    def __init__(self, max_fraction: float) -> None:
        # A lane without a single good sample would be read for ever, so 1,000 bad ones in a row always stop.
        self._limit = min(max_fraction * WINDOW, WINDOW - 1)
        self._max_fraction = max_fraction
        self._reasons: deque[str] = deque(maxlen=WINDOW)
        self._bad = 0

    def good(self) -> None:
        """Note a usable sample."""
        self._note("")

    def skip(self, sample: Skipped) -> None:
        """Note a skipped sample.

        Raises:
            DataError: more than the allowed fraction of the last 1,000 samples was bad.
        """
        self._note(sample.reason)
        if self._bad > self._limit:
            reason, count = Counter(filter(None, self._reasons)).most_common(1)[0]
            raise DataError(
                f"{self._bad} of the last {len(self._reasons)} samples could not be read, {count} of them for "
                f"'{reason}' (the last is {sample.key} in {sample.shard}): repair the shards or raise "
                f"data.max_bad_fraction={self._max_fraction}"
            )

    def _note(self, reason: str) -> None:
        if len(self._reasons) == WINDOW:
            self._bad -= bool(self._reasons[0])
        self._reasons.append(reason)
        self._bad += bool(reason)
