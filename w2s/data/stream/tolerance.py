"""When too many samples cannot be used."""

from collections import Counter, deque

from w2s.data.shards.raw_sample import Skipped
from w2s.errors import DataError

WINDOW = 1000
"""Drawn samples over which the fraction of bad ones is taken."""


class Tolerance:
    """Notes good and bad samples and refuses to continue when too many of the last 1,000 were bad."""

    def __init__(self, max_fraction: float) -> None:
        # A lane without a single good sample would be read for ever, so 1,000 bad ones in a row always stop.
        self._limit = min(max_fraction * WINDOW, WINDOW - 1)
        self._max_fraction = max_fraction
        self._reasons: deque[str] = deque(maxlen=WINDOW)

    def good(self) -> None:
        """Note a usable sample."""
        self._reasons.append("")

    def skip(self, sample: Skipped) -> None:
        """Note a skipped sample.

        Raises:
            DataError: more than the allowed fraction of the last 1,000 samples was bad.
        """
        self._reasons.append(sample.reason)
        reasons = Counter(filter(None, self._reasons))
        if reasons.total() > self._limit:
            reason, count = reasons.most_common(1)[0]
            raise DataError(
                f"{reasons.total()} of the last {len(self._reasons)} samples could not be read, {count} of them for "
                f"'{reason}' (the last is {sample.key} in {sample.shard}): repair the shards or raise "
                f"data.max_bad_fraction={self._max_fraction}"
            )
