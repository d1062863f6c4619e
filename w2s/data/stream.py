"""The training stream: global batches whose order depends on (seed, step) alone.

Sample `g` of the run (sample `g % global_batch` of step `g // global_batch`) comes from lane `g % lanes` and belongs to
rank `g % size`; which source it is from is drawn from (seed, g). As `size` divides the number of lanes and the global
batch, a rank reads whole lanes, and so do its workers. The position of the stream is where each lane stands in each
source, whoever read it.
"""

import atexit
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from w2s.config.layout import check_lanes
from w2s.config.sections import DataConfig
from w2s.data.bad import Skipped
from w2s.data.batch import Batch, merge_batches
from w2s.data.lanes import LaneState
from w2s.data.reader import LaneStates, Part, ReadPlan
from w2s.data.sample import SampleSpec
from w2s.data.shards import shard_name
from w2s.data.sizes import count_samples
from w2s.data.sources import Phase, Source, plan_sources
from w2s.data.tar import check_source
from w2s.data.workers import RESTARTS, end_reading, kill_readers, reader_pids, start_reading
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
        sources: what is read.
        bad: samples skipped by this rank since the stream was opened, by reason.
        seen: samples that this rank got from each source since the stream was opened, by the source's name.
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
        self.sources, self._phases = plan_sources(data, spec, global_batch)
        _check_sizes(data, self.sources, global_batch, size)
        for source in self.sources:
            check_source(source.shards, spec.image_key, spec.caption_key if spec.context_length else None)
        self._order = _describe_order(data, self.sources, self._phases, global_batch, seed)
        self._lanes = _restore(position, self._order, range(rank, data.lanes, size))
        self._step = self._first_step = 0 if position is None else position["step"]
        # A worker without samples would have nothing to send, so there are at most as many as a batch has lanes.
        self._workers = min(data.workers, min(data.lanes, global_batch) // size)
        self.bad: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self._plan = ReadPlan(
            sources=self.sources,
            phases=self._phases,
            number_of_lanes=data.lanes,
            shuffle=data.shuffle,
            replacement=data.replacement,
            seed=seed,
            global_batch=global_batch,
            rank=rank,
            size=size,
            max_bad_fraction=data.max_bad_fraction,
            step=self._step,
            lanes=dict(self._lanes),
        )
        self._parts: Iterator[Part | DataError] = start_reading(self._plan, self._workers)
        # At a failed exit multiprocessing would wait for ever for workers that nobody told to end.
        atexit.register(self.close)

    def next(self) -> Batch:
        """Return this rank's share of the next global batch, in the order of the global sample index.

        Raises:
            DataError: too many samples could not be used, or reading processes die again and again.
        """
        start = time.perf_counter()
        parts = self._read_step()
        batch = merge_batches([part.batch for part in parts])
        if torch.cuda.is_available():
            batch = batch.pinned()
        self.wait_seconds += time.perf_counter() - start
        for part in parts:
            for lane, states in part.lanes.items():
                self._lanes[lane] = self._lanes[lane] | states
            self.seen.update(self.sources[source].name for source in part.sources)
            self._note(part.skipped)
        self._step += 1
        return batch

    def position(self) -> Position:
        """Return where this rank's lanes stand after the last batch of `next()`, for JSON."""
        lanes = {
            str(number): {str(source): asdict(state) for source, state in sorted(states.items())}
            for number, states in sorted(self._lanes.items())
        }
        return {"step": self._step, "order": self._order, "lanes": lanes}

    def metrics(self, seen: Mapping[str, int], bad: Mapping[str, int]) -> dict[str, float]:
        """Return what to log of counts that are summed over all ranks.

        Args:
            seen: `seen` of all ranks.
            bad: `bad` of all ranks.

        Returns:
            `bad/REASON`: skipped samples; for each of several sources `source/NAME/samples`, `source/NAME/share` (of
            all samples) and `source/NAME/weight` (the share that the weights ask for). Counts are since the stream was
            opened.
        """
        figures = {f"bad/{reason}": float(count) for reason, count in bad.items()}
        total = sum(seen.values())
        if len(self.sources) > 1 and total:
            weights = self._expected_shares()
            for source, weight in zip(self.sources, weights, strict=True):
                count = seen.get(source.name, 0)
                shares = {"samples": float(count), "share": count / total, "weight": weight}
                figures |= {f"source/{source.name}/{name}": value for name, value in shares.items()}
        return figures

    def source_rows(self, index: Path) -> list[tuple[str, int, int | str, str]]:
        """Return a row for each source: name, shards, samples (where they are known) and its weight in each phase.

        Args:
            index: folder of the sizes that `w2s data index` has counted.
        """
        by_source = zip(*(phase.weights for phase in self._phases), strict=True)
        weights = [" then ".join(f"{weight:g}" for weight in phases) for phases in by_source]
        return [
            (source.name, len(source.shards), count_samples(source.shards, index) or "not counted", weight)
            for source, weight in zip(self.sources, weights, strict=True)
        ]

    def reader_pids(self) -> list[int]:
        """Return the ids of the reading processes."""
        return reader_pids(self._parts)

    def close(self) -> None:
        """Stop the workers."""
        parts, self._parts = self._parts, iter(())
        end_reading(parts)
        atexit.unregister(self.close)

    def _expected_shares(self) -> list[float]:
        """Return each source's probability, averaged over the steps since the stream was opened."""
        batch = self._plan.global_batch
        edges = [phase.first // batch for phase in self._phases[1:]]
        bounds = zip([0, *edges], [*edges, self._step], strict=True)
        steps = [max(0, min(end, self._step) - max(begin, self._first_step)) for begin, end in bounds]
        return [
            sum(n * phase.weights[source] for n, phase in zip(steps, self._phases, strict=True)) / sum(steps)
            for source in range(len(self.sources))
        ]

    def _read_step(self) -> list[Part]:
        """Read the parts of the next step, with new reading processes where one died."""
        for _ in range(RESTARTS):
            try:
                return [self._next_part() for _ in range(max(1, self._workers))]
            except (RuntimeError, OSError, EOFError) as error:  # torch or a broken connection: a process was killed
                logger.warning("a reading process died, step %d is read again: %s", self._step, error)
                kill_readers(self._parts)
                plan = replace(self._plan, step=self._step, lanes=dict(self._lanes))
                self._parts = start_reading(plan, self._workers)
        raise DataError(
            f"reading processes die again and again, at step {self._step}: is there enough memory? "
            f"Lower data.workers={self._workers} or data.shuffle={self._plan.shuffle}"
        )

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


def _check_sizes(data: DataConfig, sources: Sequence[Source], global_batch: int, size: int) -> None:
    lanes = data.lanes
    check_lanes(lanes, global_batch, size)
    smallest = min(sources, key=lambda source: len(source.shards))
    shards = len(smallest.shards)
    if shards < lanes and not data.replacement:
        fitting = [n for n in range(size, shards + 1, size) if global_batch % n == 0 or n % global_batch == 0]
        fix = f"use data.lanes={fitting[-1]} or data.replacement=true" if fitting else "use data.replacement=true"
        what = "data.train" if len(sources) == 1 else smallest.pattern
        raise ConfigError(f"data.lanes={lanes} needs as many shards, {what} has {shards}: {fix}")


def _describe_order(
    data: DataConfig, sources: Sequence[Source], phases: Sequence[Phase], global_batch: int, seed: int
) -> dict[str, Any]:
    """Return everything that the order of samples depends on, under the names that a user knows."""
    return {
        "data.lanes": data.lanes,
        "data.shuffle": data.shuffle,
        "data.replacement": data.replacement,
        "train.global_batch": global_batch,
        "run.seed": seed,
        "data.train": ", ".join(_describe_shards(source.shards) for source in sources),
        "data.weights": [[phase.first, *phase.weights] for phase in phases],
    }


def _describe_shards(shards: Sequence[str]) -> str:
    names = "\n".join(map(shard_name, shards))
    return f"{len(shards)} shards {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def _restore(position: Position | None, order: dict[str, Any], lanes: range) -> dict[int, LaneStates]:
    if position is None:
        return {lane: {} for lane in lanes}
    try:
        for key, value in order.items():
            if position["order"].get(key) != value:
                raise DataError(
                    f"cannot go on with {key}={value}: the run began with {key}={position['order'].get(key)}, "
                    "keep that or start a new run"
                )
        missing = [lane for lane in lanes if str(lane) not in position["lanes"]]
        if not isinstance(position["step"], int):
            raise TypeError("a step is a number")
        if missing:
            raise DataError(f"the data position has no lane {missing[0]}: merge the positions of all ranks first")
        return {
            lane: {int(source): LaneState(**state) for source, state in position["lanes"][str(lane)].items()}
            for lane in lanes
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError("the data position of the checkpoint is damaged: use another checkpoint") from error
