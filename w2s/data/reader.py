"""The reading side of the stream: one process that turns its lanes into its part of every batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from w2s.data.bad import BadSample, Skipped, Tolerance
from w2s.data.batch import Batch
from w2s.data.lanes import Lane, LaneState, ShardOrder
from w2s.data.sample import SampleSpec, Views, caption_hash, make_views
from w2s.data.tokens import tokenize
from w2s.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process read for one batch."""

    batch: Batch
    lanes: dict[int, LaneState]
    """Where the lanes that were read stand after this batch."""
    skipped: list[Skipped]


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """All that a reading process has to know."""

    shards: list[str]
    order: ShardOrder
    window: int
    spec: SampleSpec
    global_batch: int
    rank: int
    size: int
    """Data-parallel size."""
    max_bad_fraction: float
    step: int
    """First step to read."""
    lanes: dict[int, LaneState]
    """Where each lane of the rank stands at that step."""


class Reader:
    """Reads every `workers`-th of the rank's lanes.

    Args:
        plan: what the rank reads.
        worker: number of this process among those of the rank.
        workers: reading processes of the rank.
    """

    def __init__(self, plan: ReadPlan, worker: int, workers: int) -> None:
        self._plan = plan
        self._lanes = {
            number: Lane(number, plan.shards, plan.order, plan.window, plan.lanes[number])
            for number in sorted(plan.lanes)[worker::workers]
        }
        self._tolerance = Tolerance(plan.max_bad_fraction)

    def read(self, step: int) -> Part:
        """Read this process's samples of a step; steps have to be read in order.

        Raises:
            DataError: too many samples could not be used.
        """
        first = step * self._plan.global_batch
        of_rank = range(first + self._plan.rank, first + self._plan.global_batch, self._plan.size)
        lane_of = {index: index % self._plan.order.lanes for index in of_rank}
        mine = {index: lane for index, lane in lane_of.items() if lane in self._lanes}
        skipped: list[Skipped] = []
        views = [self._draw(index, self._lanes[lane], skipped) for index, lane in mine.items()]
        states = {lane: self._lanes[lane].state for lane in mine.values()}
        return Part(batch=_collate(views, self._plan.spec), lanes=states, skipped=skipped)

    def _draw(self, index: int, lane: Lane, skipped: list[Skipped]) -> Views:
        """Take samples from the lane until one is good."""
        while True:
            raw = lane.next()
            try:
                views = make_views(raw, self._plan.spec, self._plan.order.seed, index)
            except BadSample as error:
                skipped.append(Skipped(raw.key, raw.shard, str(error)))
                self._tolerance.skip(skipped[-1])
            else:
                self._tolerance.good()
                return views


class PartDataset(IterableDataset[Part | DataError]):
    """The parts of all steps, for torch's DataLoader.

    An error is handed over as the last item: raised in a worker, it would arrive with a traceback in its message.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[Part | DataError]:
        worker = get_worker_info()
        reader = Reader(self._plan, worker.id, worker.num_workers) if worker else Reader(self._plan, 0, 1)
        for step in count(self._plan.step):
            try:
                yield reader.read(step)
            except Exception as error:  # raised in a worker, it would leave the worker and a traceback behind
                yield error if isinstance(error, DataError) else DataError(f"reading failed: {error!r}")
                return


def _collate(views: list[Views], spec: SampleSpec) -> Batch:
    captions = [view.caption for view in views if view.caption is not None]
    teacher = [view.teacher_image for view in views if view.teacher_image is not None]
    masks = [view.mask for view in views if view.mask is not None]
    kept = [view.kept for view in views if view.kept is not None]
    return Batch(
        images=torch.stack([view.image for view in views]),
        teacher_images=torch.stack(teacher) if teacher else None,
        masks=torch.from_numpy(np.stack(masks)) if masks else None,
        kept=torch.from_numpy(np.stack(kept)) if kept else None,
        tokens=tokenize(captions, spec.context_length) if captions else None,
        captions=torch.tensor([caption_hash(caption) for caption in captions]) if captions else None,
        keys=[view.key for view in views],
        indices=torch.tensor([view.index for view in views]),
    )
