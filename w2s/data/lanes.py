"""Lanes: the fixed number of streams that the sample order is made of.

A lane draws its shards from one source, reads a window of samples, shuffles the window and hands it out. What it does
depends on the seed, the source and its own number alone, so the order of samples is the same at every number of ranks
and workers.
"""

import functools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from w2s.data.containers import read_shard
from w2s.data.counter import Purpose, generator
from w2s.data.samples import RawSample


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """Where a lane stands: enough to read on from there, at most one window again and without decoding."""

    shard: int = 0
    """Number of the lane's draw of the shard in which the window begins."""
    offset: int = 0
    """Byte of that shard at which the window begins."""
    taken: int = 0
    """Samples of the window that were handed out."""
    drawn: int = 0
    """Samples that were handed out since the run began, usable or not."""


@dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """The order in which the lanes draw shards."""

    shards: int
    """Number of shards."""
    lanes: int
    """Number of lanes; without replacement at most the number of shards."""
    seed: int
    replacement: bool
    """Draw each shard anew from all of them, instead of dealing all out in every epoch."""

    def draw(self, lane: int, number: int) -> int:
        """Return the shard that a lane reads as its draw `number`."""
        if self.replacement:
            return int(generator(self.seed, Purpose.SHARDS, lane, number).integers(self.shards))
        epoch, place = divmod(number, self._shards_per_epoch(lane))
        return int(_permutation(self.shards, self.seed, epoch)[lane + place * self.lanes])

    def ends_epoch(self, lane: int, number: int) -> bool:
        """Tell whether draw `number` is the last of the lane's epoch; never with replacement."""
        return not self.replacement and (number + 1) % self._shards_per_epoch(lane) == 0

    def _shards_per_epoch(self, lane: int) -> int:
        return len(range(lane, self.shards, self.lanes))


@functools.lru_cache(maxsize=4)  # all lanes of a process ask for the same epoch, or for two at its border
def _permutation(shards: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return generator(seed, Purpose.SHARDS, epoch).permutation(shards)


class Lane:
    """An endless stream of raw samples.

    Args:
        number: the lane's number.
        shards: paths of all shards.
        order: which shard comes when.
        window: samples that are shuffled together; without replacement a window ends with the lane's epoch, so that
            every sample comes once before any comes again.
        state: where to read on.
        wanted: extensions of the files that are read; None reads all.

    Attributes:
        state: where the lane stands.
    """

    def __init__(
        self,
        number: int,
        shards: Sequence[str],
        order: ShardOrder,
        window: int,
        state: LaneState,
        wanted: Container[str] | None = None,
    ) -> None:
        self.state = state
        self._wanted = wanted
        self._number = number
        self._shards = shards
        self._order = order
        self._size = window
        self._end = state
        self._reader = self._open(state)
        self._window = self._read_window()

    def next(self) -> RawSample:
        """Hand out the next sample."""
        if self.state.taken == len(self._window):
            self.state = replace(self._end, taken=0, drawn=self.state.drawn)
            self._window = self._read_window()
        sample = self._window[self.state.taken]
        self.state = replace(self.state, taken=self.state.taken + 1, drawn=self.state.drawn + 1)
        return sample

    def _open(self, at: LaneState) -> Iterator[RawSample]:
        path = self._shards[self._order.draw(self._number, at.shard)]
        return read_shard(path, at.offset, self._wanted)

    def _read_window(self) -> list[RawSample]:
        """Read the window that begins at `self.state`, and shuffle it."""
        samples: list[RawSample] = []
        while len(samples) < self._size:
            sample = next(self._reader, None)
            if sample is not None:
                samples.append(sample)
                self._end = replace(self._end, offset=sample.end)
                continue
            epoch_ended = self._order.ends_epoch(self._number, self._end.shard)
            self._end = replace(self._end, shard=self._end.shard + 1, offset=0)
            self._reader = self._open(self._end)
            if epoch_ended and samples:
                break
        first = self.state.drawn - self.state.taken
        order = generator(self._order.seed, Purpose.WINDOW, self._number, first).permutation(len(samples))
        return [samples[i] for i in order]
