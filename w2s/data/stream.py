"""The training stream: global batches whose order depends on (seed, step) alone.

Sample `g` of the run (sample `g % global_batch` of step `g // global_batch`) comes from lane `g % lanes` and belongs to
rank `g % size`. As `size` divides the number of lanes and the global batch, a rank reads whole lanes, and so do its
workers. The position of the stream is where each lane stands, whoever read it.
"""

import atexit
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2s.config.sections import DataConfig
from w2s.data.bad import Skipped
from w2s.data.batch import Batch, merge_batches
from w2s.data.lanes import LaneState, ShardOrder
from w2s.data.reader import Part, ReadPlan
from w2s.data.sample import SampleSpec
from w2s.data.shards import check_shard, list_shards
from w2s.data.workers import start_reading
from w2s.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Position = dict[str, Any]


class Stream:
    """This rank's share of the global batches, from any position on.

    Args:
        data: where the samples are and how they are drawn.
        spec: what the stage wants of a sample.
        global_batch: samples of a step over all ranks.
        seed: seed of the run.
        rank: data-parallel rank.
        size: data-parallel size.
        position: where to go on: what `position()` gave, merged over the ranks, at any size and number of workers.

    Attributes:
        bad: samples skipped by this rank since the stream was opened, by reason.
        wait_seconds: time that `next()` has waited for samples.

    Raises:
        ConfigError: sizes that do not divide.
        DataError: shards that are missing or lack images or captions, or a position of another order of samples.
    """

    def __init__(
        self,
        data: DataConfig,
        spec: SampleSpec,
        *,
        global_batch: int,
        seed: int,
        rank: int,
        size: int,
        position: Position | None = None,
    ) -> None:
        shards = list_shards(data.train)
        _check_sizes(data, len(shards), global_batch, size)
        check_shard(shards[0], spec.image_key, spec.caption_key if spec.context_length else None)
        self._order = _describe_order(data, shards, global_batch, seed)
        self._step = 0 if position is None else position["step"]
        self._lanes = _restore(position, self._order, range(rank, data.lanes, size))
        # A worker without samples would have nothing to send, so there are at most as many as a batch has lanes.
        workers = min(data.workers, min(data.lanes, global_batch) // size)
        self._readers = max(1, workers)
        self.bad: Counter[str] = Counter()
        self.wait_seconds = 0.0
        plan = ReadPlan(
            shards=[str(path) for path in shards],
            order=ShardOrder(shards=len(shards), lanes=data.lanes, seed=seed, replacement=data.replacement),
            window=data.shuffle,
            spec=spec,
            global_batch=global_batch,
            rank=rank,
            size=size,
            max_bad_fraction=data.max_bad_fraction,
            step=self._step,
            lanes=dict(self._lanes),
        )
        self._parts = start_reading(plan, workers)
        # At a failed exit multiprocessing would wait for ever for workers that nobody told to end.
        atexit.register(self.close)

    def next(self) -> Batch:
        """Return this rank's share of the next global batch, in the order of the global sample index.

        Raises:
            DataError: too many samples could not be used.
        """
        start = time.perf_counter()
        parts = [self._next_part() for _ in range(self._readers)]
        batch = merge_batches([part.batch for part in parts])
        self.wait_seconds += time.perf_counter() - start
        for part in parts:
            self._lanes |= part.lanes
            self._note(part.skipped)
        self._step += 1
        return batch

    def position(self) -> Position:
        """Return where this rank's lanes stand after the last batch of `next()`, for JSON."""
        lanes = {str(number): asdict(state) for number, state in sorted(self._lanes.items())}
        return {"step": self._step, "order": self._order, "lanes": lanes}

    def close(self) -> None:
        """Stop the workers."""
        self._parts = iter(())
        atexit.unregister(self.close)

    def _next_part(self) -> Part:
        part = next(self._parts)
        if isinstance(part, DataError):
            self.close()
            raise part
        return part

    def _note(self, skipped: Sequence[Skipped]) -> None:
        for sample in skipped:
            self.bad[sample.reason] += 1
            count = self.bad[sample.reason]
            # The 1st, 2nd, 4th, 8th... of a kind is enough to act on, and cannot flood a log.
            if count & (count - 1) == 0:
                logger.warning("skipped %s in %s: %s (%d so far)", sample.key, sample.shard, sample.reason, count)


def merge_positions(positions: Sequence[Position]) -> Position:
    """Join the positions of all ranks after the same step into one that any rank can go on from.

    Raises:
        DataError: positions of different steps or of different orders of samples.
    """
    first = positions[0]
    for other in positions:
        if other["step"] != first["step"] or other["order"] != first["order"]:
            raise DataError(
                f"data positions of steps {first['step']} and {other['step']} do not belong together: "
                "merge what all ranks gave after the same step"
            )
    return first | {"lanes": {number: state for each in positions for number, state in each["lanes"].items()}}


def _check_sizes(data: DataConfig, shards: int, global_batch: int, size: int) -> None:
    lanes = data.lanes
    if lanes % size or global_batch % size:
        raise ConfigError(
            f"{size} data-parallel ranks cannot share data.lanes={lanes} and train.global_batch={global_batch} "
            f"evenly: use {_divisors_text(lanes, global_batch)} ranks, or multiples of {size} for both"
        )
    if global_batch % lanes and lanes % global_batch:
        raise ConfigError(
            f"data.lanes={lanes} and train.global_batch={global_batch} do not divide: "
            f"use a train.global_batch that is a multiple of {lanes}"
        )
    if shards < lanes and not data.replacement:
        fitting = [n for n in range(size, shards + 1, size) if global_batch % n == 0 or n % global_batch == 0]
        fix = f"use data.lanes={fitting[-1]} or data.replacement=true" if fitting else "use data.replacement=true"
        raise ConfigError(f"data.lanes={lanes} needs as many shards, data.train has {shards}: {fix}")


def _divisors_text(*numbers: int) -> str:
    legal = [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]
    return ", ".join(map(str, legal))


def _describe_order(data: DataConfig, shards: Sequence[Path], global_batch: int, seed: int) -> dict[str, Any]:
    """Return everything that the order of samples depends on, under the names that a user knows."""
    names = "\n".join(path.name for path in shards)
    return {
        "data.lanes": data.lanes,
        "data.shuffle": data.shuffle,
        "data.replacement": data.replacement,
        "train.global_batch": global_batch,
        "run.seed": seed,
        "data.train": f"{len(shards)} shards, {hashlib.sha256(names.encode()).hexdigest()[:12]}",
    }


def _restore(position: Position | None, order: dict[str, Any], lanes: range) -> dict[int, LaneState]:
    if position is None:
        return {lane: LaneState() for lane in lanes}
    for name, value in order.items():
        if position["order"].get(name) != value:
            raise DataError(
                f"cannot go on with {name}={value}: the run began with {name}={position['order'].get(name)}, "
                "keep that or start a new run"
            )
    missing = [lane for lane in lanes if str(lane) not in position["lanes"]]
    if missing:
        raise DataError(f"the data position has no lane {missing[0]}: merge the positions of all ranks first")
    return {lane: LaneState(**position["lanes"][str(lane)]) for lane in lanes}
