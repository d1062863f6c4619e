"""Lanes: the fixed number of streams that the sample order is made of.

A lane draws its shards from one source, reads a window of samples, shuffles the window and hands it out. What it does
depends on the seed, the source and which lane it is alone, so the order of samples is the same at every number of ranks
and workers.
"""

import functools
from collections.abc import Container, Generator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.shards.containers import read_shard
from w2s.data.shards.raw_sample import DONE, RawSample
from w2s.data.shards.storage import SourceConnection
from w2s.data.stream.prefetch import Prefetcher

_FEW = 4
"""Samples of a first window, or up to twice as many."""


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """Where a lane stands: enough to read on from there, at most one window again and without decoding."""

    window: int = 0
    """Number of the window."""
    shard: int = 0
    """Number of the lane's draw of the shard in which the window begins."""
    offset: int = 0
    """Place in that shard at which the window begins, as `RawSample.end`."""
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

    def draw(self, lane: int, index: int) -> int:
        """Return the shard that a lane reads as its draw `index`, from 0."""
        if self.replacement:
            return int(generator(self.seed, Purpose.SHARDS, lane, index).integers(self.shards))
        epoch, place = divmod(index, self._shards_per_epoch(lane))
        return int(_permutation(self.shards, self.seed, epoch)[lane + place * self.lanes])

    def ends_epoch(self, lane: int, index: int) -> bool:
        """Tell whether draw `index` is the last of the lane's epoch; never with replacement."""
        return not self.replacement and (index + 1) % self._shards_per_epoch(lane) == 0

    def _shards_per_epoch(self, lane: int) -> int:
        return len(range(lane, self.shards, self.lanes))


@functools.lru_cache(maxsize=4)  # all lanes of a process ask for the same epoch, or for two at its border
def _permutation(shards: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return generator(seed, Purpose.SHARDS, epoch).permutation(shards)


class _Step(NamedTuple):
    """What a lane comes by: a sample, or the end of an epoch."""

    sample: RawSample | None
    size: int
    """Bytes of the sample."""
    shard: int
    """Number of the lane's draw of the shard from which it reads on."""
    offset: int
    """Place in that shard from which it reads on."""


class Lane:
    """An endless stream of raw samples. While a window is handed out the next one is read by a thread of the lane.

    Args:
        lane: which one it is, from 0.
        shards: paths of all shards.
        order: which shard comes when.
        window: samples that are shuffled together; without replacement a window ends with the lane's epoch, so that
            every sample comes once before any comes again.
        state: where to read on.
        wanted: extensions of the files that are read; None reads all.
        room: bytes of samples that are read ahead.
        link: patience with the shards' servers, and what became of it.

    Attributes:
        state: where the lane stands.
    """

    def __init__(
        self,
        lane: int,
        shards: Sequence[str],
        order: ShardOrder,
        window: int,
        state: LaneState,
        wanted: Container[str] | None = None,
        room: float = float("inf"),
        link: SourceConnection | None = None,
    ) -> None:
        self.state = state
        self._lane, self._shards, self._order, self._size = lane, shards, order, window
        self._wanted, self._link = wanted, link or SourceConnection()
        self._begun = False
        self._left: list[RawSample] = []
        self._end = _Step(None, 0, state.shard, state.offset)
        self._steps = Prefetcher(
            self._walk(state.shard, state.offset),
            size=lambda step: step.size,
            most=window,
            room=room,
            waited=lambda seconds: self._link.note(waited=seconds),
        )

    def next(self) -> RawSample:
        """Hand out the next sample."""
        while not self._left:
            if self._begun:
                at, end = self.state, self._end
                self.state = replace(at, window=at.window + 1, shard=end.shard, offset=end.offset, taken=0)
            self._begun = True
            self._left = self._read_window()[self.state.taken :][::-1]
        self.state = replace(self.state, taken=self.state.taken + 1, drawn=self.state.drawn + 1)
        return self._left.pop()

    def close(self) -> None:
        """End the lane's thread."""
        self._steps.close()

    def _walk(self, shard: int, offset: int) -> Generator[_Step, None, None]:
        """Yield the lane's samples in the order of its shards, from a place on."""
        empty = 0
        while True:
            path = self._shards[self._order.draw(self._lane, shard)]
            empty += 1
            for sample in read_shard(path, offset, self._wanted, self._link):
                self._link.note(size=sample.size)
                yield _Step(sample, sample.size, shard, sample.end)
                empty = 0
            if empty > len(self._shards):  # counted as bad ones, so that the run ends
                yield _Step(RawSample("", path, {}, damage="shard is empty"), 0, shard, DONE)
            if self._order.ends_epoch(self._lane, shard):
                yield _Step(None, 0, shard + 1, 0)
            shard, offset = shard + 1, 0

    def _read_window(self) -> list[RawSample]:
        """Read the window that begins at `self.state`, and shuffle it."""
        samples: list[RawSample] = []
        size = window_size(self._size, self.state.window, self._lane, self._order.lanes)
        while len(samples) < size:
            self._end = self._steps.next()
            if self._end.sample is not None:
                samples.append(self._end.sample)
            elif samples:
                break
        self._end = self._end._replace(sample=None)
        first = self.state.drawn - self.state.taken
        order = generator(self._order.seed, Purpose.WINDOW, self._lane, first).permutation(len(samples))
        return [samples[i] for i in order]


def window_size(full: int, index: int, lane: int, lanes: int) -> int:
    """Return the samples of a lane's window.

    The first window has a few samples, so that a run starts soon, and the next ones about twice as many each, up to
    the full size. The lanes begin with sizes between one and two times the same, so that the ends of their full windows
    are evenly spread and they never need a new window at the same moment.

    Args:
        full: samples of a window, as configured.
        index: windows of the lane before this one.
        lane: which one, from 0.
        lanes: number of lanes.
    """
    doublings = max(0, (full // _FEW).bit_length() - 1)
    if index >= doublings:
        return full
    return min(full, round(full * 2.0 ** (index - doublings) * (1 + lane / lanes)))
