"""The reading side of the stream: one process that turns its lanes into its part of every batch."""

import resource
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count

import torch
from torch.utils.data import IterableDataset, get_worker_info

from w2s.data.samples.batch import Batch, merge_batches
from w2s.data.samples.captions import caption_hash
from w2s.data.samples.random_numbers import source_seed
from w2s.data.samples.sample import SampleSpec, make_sample, sample_caption
from w2s.data.samples.tokens import tokenize
from w2s.data.shards.raw_sample import BadSample, Skipped
from w2s.data.shards.storage import SourceConnection, Traffic
from w2s.data.stream.lanes import Lane, LaneState, ShardOrder
from w2s.data.stream.phases import Phase, phase_at
from w2s.data.stream.sources import Source
from w2s.data.stream.tolerance import Tolerance
from w2s.data.stream.workers import with_errors
from w2s.errors import DataError

LaneStates = dict[int, LaneState]
"""Where a lane stands in each source that it has read from."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process read for one batch."""

    batch: Batch
    lanes: dict[int, LaneStates]
    """Where the lanes that were read stand after this batch, in the sources that were read."""
    sources: list[int]
    """Source of each sample of the batch."""
    skipped: list[Skipped]
    traffic: dict[int, Traffic]
    """What came from each source since the part before."""


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """All that a reading process has to know."""

    sources: list[Source]
    phases: list[Phase]
    number_of_lanes: int
    shuffle: int
    """Samples that a lane shuffles together, over all of its sources."""
    replacement: bool
    seed: int
    global_batch: int
    rank: int
    size: int
    """Number of reading ranks."""
    max_bad_fraction: float
    read_ahead: float
    """Bytes that the rank reads ahead of use."""
    timeout: float
    """Seconds in which a connection has to give something."""
    step: int
    """First step to read."""
    lanes: dict[int, LaneStates]
    """Where each lane of the rank stands at that step."""

    def open_lane(self, lane: int, source: int, room: float, link: SourceConnection) -> Lane:
        """Return the part of a lane that reads from one source.

        Args:
            lane: which one.
            source: which one.
            room: bytes that a lane of one source may read ahead.
            link: patience with the source, and its traffic.
        """
        shards = self.sources[source].shards
        order = ShardOrder(
            shards=len(shards),
            lanes=self.number_of_lanes,
            seed=source_seed(self.seed, source),
            replacement=self.replacement,
        )
        share = max(phase.weights[source] for phase in self.phases)
        window = max(1, round(self.shuffle * share))
        state = self.lanes[lane].get(source, LaneState())
        return Lane(lane, shards, order, window, state, self.phases[0].spec.extensions, room * share, link)


class Reader:
    """Reads every `workers`-th of the rank's lanes.

    Args:
        plan: what the rank reads.
        worker: number of this process among those of the rank.
        workers: reading processes of the rank.
    """

    def __init__(self, plan: ReadPlan, worker: int, workers: int) -> None:
        self._plan = plan
        self._mine = set(sorted(plan.lanes)[worker::workers])
        self._links = [SourceConnection(plan.timeout) for _ in plan.sources]
        # Shared among the sources by their weights, as the windows are.
        shares = sum(max(weights) for weights in zip(*(phase.weights for phase in plan.phases), strict=True))
        self._room = plan.read_ahead / len(plan.lanes) / shares
        self._tolerance = Tolerance(plan.max_bad_fraction)
        _allow_many_files()
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._open_lanes(phase_at(plan.phases, plan.step * plan.global_batch))

    def read(self, step: int) -> Part:
        """Read this process's samples of a step; steps have to be read in order.

        Raises:
            DataError: too many samples could not be used.
        """
        plan = self._plan
        first = step * plan.global_batch
        phase = phase_at(plan.phases, first)
        if phase.first == first:
            self._open_lanes(phase)
        of_rank = range(first + plan.rank, first + plan.global_batch, plan.size)
        lane_of = {index: index % plan.number_of_lanes for index in of_rank}
        mine = {index: lane for index, lane in lane_of.items() if lane in self._mine}
        skipped: list[Skipped] = []
        samples, captions, sources, states = [], [], [], dict[int, LaneStates]()
        for index, lane in mine.items():
            source = phase.draw(plan.seed, index)
            stream = self._lanes[lane, source]
            sample, caption = self._draw(index, stream, phase.spec, skipped)
            samples.append(sample)
            captions.append(caption)
            sources.append(source)
            states.setdefault(lane, {})[source] = stream.state
        batch = merge_batches(samples)
        if phase.spec.context_length:
            batch.tokens = tokenize(captions, phase.spec.context_length)
            batch.caption_hashes = torch.tensor(list(map(caption_hash, captions)))
        return Part(
            batch=batch,
            lanes=states,
            sources=sources,
            skipped=skipped,
            traffic={source: link.take() for source, link in enumerate(self._links)},
        )

    def close(self) -> None:
        """End the threads that read ahead."""
        for link in self._links:
            link.closed.set()
        for lane in self._lanes.values():
            lane.close()

    def _open_lanes(self, phase: Phase) -> None:
        """Begin to read what a phase draws from, in all lanes at once."""
        for lane in sorted(self._mine):
            for source, weight in enumerate(phase.weights):
                if weight and (lane, source) not in self._lanes:
                    self._lanes[lane, source] = self._plan.open_lane(lane, source, self._room, self._links[source])

    def _draw(self, index: int, lane: Lane, spec: SampleSpec, skipped: list[Skipped]) -> tuple[Batch, str]:
        """Take samples from the lane until one is good."""
        while True:
            raw = lane.next()
            try:
                if raw.damage:
                    raise BadSample(raw.damage)
                caption = sample_caption(raw, spec, self._plan.seed, index)
                sample = make_sample(raw, spec, self._plan.seed, index)
            except BadSample as error:
                skipped.append(Skipped(raw.key, raw.shard, str(error)))
                self._tolerance.skip(skipped[-1])
            else:
                self._tolerance.good()
                return sample, caption


class PartDataset(IterableDataset[Part | DataError]):
    """The parts of all steps, for torch's DataLoader; an error is the last item."""

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Part | DataError]:
        worker = get_worker_info()
        reader = Reader(self._plan, worker.id, worker.num_workers) if worker else Reader(self._plan, 0, 1)
        with closing(reader):
            yield from with_errors(map(reader.read, count(self._plan.step)))


def _allow_many_files() -> None:
    """Let this process open as many files as the machine allows: every lane keeps its shards open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
