"""The training stream: global batches whose order depends on (seed, step) alone.

Sample `g` of the run (sample `g % global_batch` of step `g // global_batch`) comes from lane `g % lanes` and belongs to
rank `g % size`; which source it is from is drawn from (seed, g). As `size` divides the number of lanes and the global
batch, a rank reads whole lanes, and so do its workers. The position of the stream is where each lane stands in each
source, whoever read it.
"""

import atexit
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from w2s.config.batching import lanes_per_rank
from w2s.config.layout_checks import check_lanes
from w2s.config.sections import DataConfig
from w2s.data.samples.batch import Batch, merge_batches
from w2s.data.samples.sample import SampleSpec
from w2s.data.shards.listing import without_secrets
from w2s.data.shards.raw_sample import Skipped
from w2s.data.stream.phases import plan_phases
from w2s.data.stream.position import Position, describe_order, restore_lanes
from w2s.data.stream.reader import Part, PartDataset, ReadPlan
from w2s.data.stream.sources import Source, find_sources
from w2s.data.stream.workers import RESTARTS, end_reading, kill_readers, reader_pids, start_workers
from w2s.errors import DataError

logger = logging.getLogger(__name__)

_LONG = 1.0
"""Seconds of waiting for samples of which the log tells who is to blame."""


class Stream:
    """This rank's share of the global batches, from any position on.

    Args:
        data: where the samples are and how they are drawn.
        spec: what the stage wants of a sample.
        global_batch: samples of a step over all ranks.
        seed: seed of the run.
        rank: which of the readers this is (`Ranks.data_reader_rank`): every rank reads a share, model-parallel ones
            too.
        size: number of readers, which is that of all ranks.
        position: where to continue: what `position()` gave, merged over the ranks, at any size and number of workers.
        sources: what `find_sources` gave, where it was called before.

    Attributes:
        sources: what is read.
        bad: samples skipped by this rank since the stream was opened, by reason.
        reopened: connections that this rank had to open again since the stream was opened, by reason.
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
        sources: Sequence[Source] | None = None,
    ) -> None:
        check_lanes(data.lanes, global_batch, size)
        if sources is None:
            sources = find_sources(data, global_batch, size, captions=spec.context_length > 0)
        self.sources = list(sources)
        self._phases = plan_phases(data, spec, global_batch)
        self._order = describe_order(data, self.sources, self._phases, global_batch, seed)
        self._lanes = restore_lanes(position, self._order, range(rank, data.lanes, size))
        self._step = self._first_step = 0 if position is None else position["step"]
        # A worker without samples would have nothing to send, so there are at most as many as a batch has lanes.
        self._workers = min(data.workers, lanes_per_rank(data.lanes, global_batch, size))
        self.bad: Counter[str] = Counter()
        self.reopened: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self._waits = 0
        self._came: defaultdict[str, float] = defaultdict(float)
        self._counted_at = time.perf_counter()
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
            read_ahead=data.read_ahead_mb * 1e6,
            timeout=data.timeout,
            step=self._step,
            lanes=self._lanes,
        )
        self._parts = self._start_reading()
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
        waited = time.perf_counter() - start
        self.wait_seconds += waited
        for part in parts:
            for lane, states in part.lanes.items():
                self._lanes[lane] = self._lanes[lane] | states
            self.seen.update(self.sources[source].name for source in part.sources)
            self._note(part.skipped, self.bad, "skipped %s in %s: %s (%d so far)")
            for source, traffic in part.traffic.items():
                self._came[f"{source}/bytes"] += traffic.bytes
                self._came[f"{source}/waited"] += traffic.waited
                self._note(traffic.broken, self.reopened, "opened again, from %s on, %s: %s (%d so far)")
        if waited > _LONG and self._step > self._first_step:
            self._note_wait(waited, parts)
        self._step += 1
        return batch

    def position(self) -> Position:
        """Return where this rank's lanes stand after the last batch of `next()`, for JSON."""
        lanes = {
            str(lane): {str(source): asdict(state) for source, state in sorted(states.items())}
            for lane, states in sorted(self._lanes.items())
        }
        return {"step": self._step, "order": self._order, "lanes": lanes}

    def counts(self) -> dict[str, float]:
        """Return what this rank counts, to be added up over the ranks for `metrics`: in part since the last call."""
        now = time.perf_counter()
        counts = {f"bad/{reason}": float(count) for reason, count in self.bad.items()}
        counts |= {f"reopened/{reason}": float(count) for reason, count in self.reopened.items()}
        counts |= {f"seen/{name}": float(count) for name, count in self.seen.items()}
        counts |= {"ranks": 1.0, "processes": float(max(1, self._workers)), "seconds": now - self._counted_at}
        counts |= self._came
        self._came.clear()
        self._counted_at = now
        return counts

    def metrics(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Return what to log of `counts` that are added up over all ranks.

        Returns:
            Since the stream was opened: `bad/REASON`: skipped samples; `reopened/REASON`: connections that had to be
            opened again; for each of several sources `source/NAME/samples`, `source/NAME/share` (of all samples) and
            `source/NAME/weight` (the share that the weights ask for). Since the last call of `counts`, for each source:
            `source/NAME/mb_per_second`, over all ranks, and `source/NAME/wait`, the share of the reading processes'
            time in which they had to wait for it.
        """
        figures = {name: count for name, count in counts.items() if name.startswith(("bad/", "reopened/"))}
        seconds = counts["seconds"] / counts["ranks"]
        for index, source in enumerate(self.sources):
            came = counts.get(f"{index}/bytes", 0.0) / 1e6 / seconds
            wait = counts.get(f"{index}/waited", 0.0) / (seconds * counts["processes"])
            figures |= {f"source/{source.name}/mb_per_second": came, f"source/{source.name}/wait": min(1.0, wait)}
        seen = [counts.get(f"seen/{source.name}", 0.0) for source in self.sources]
        total = sum(seen)
        if len(seen) > 1 and total:
            for source, count, weight in zip(self.sources, seen, self._expected_shares(), strict=True):
                shares = {"samples": count, "share": count / total, "weight": weight}
                figures |= {f"source/{source.name}/{name}": value for name, value in shares.items()}
        return figures

    def source_rows(self, sizes: Mapping[str, int | None]) -> list[tuple[str, int, int | str, str]]:
        """Return a row for each source: name, shards, samples and its weight in each phase.

        Args:
            sizes: samples by the source's name; None where they are not known.
        """
        by_source = zip(*(phase.weights for phase in self._phases), strict=True)
        weights = [" then ".join(f"{weight:g}" for weight in phases) for phases in by_source]
        return [
            (source.name, len(source.shards), sizes[source.name] or "not counted", weight)
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

    def _start_reading(self) -> Iterator[Part | DataError]:
        plan = replace(self._plan, step=self._step, lanes=dict(self._lanes))
        return start_workers(PartDataset(plan), self._workers)

    def _read_step(self) -> list[Part]:
        """Read the parts of the next step, with new reading processes where one died."""
        for _ in range(RESTARTS):
            try:
                return [self._next_part() for _ in range(max(1, self._workers))]
            except (RuntimeError, OSError, EOFError) as error:  # torch or a broken connection: a process was killed
                logger.warning("a reading process died, step %d is read again: %s", self._step, error)
                kill_readers(self._parts)
                self._parts = self._start_reading()
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

    def _note(self, skipped: Sequence[Skipped], counter: Counter[str], message: str) -> None:
        for each in skipped:
            counter[each.reason] += 1
            count = counter[each.reason]
            if _is_telling(count):
                logger.warning(message, each.key, without_secrets(each.shard), each.reason, count)

    def _note_wait(self, seconds: float, parts: Sequence[Part]) -> None:
        """Say which source made a step wait."""
        self._waits += 1
        if not _is_telling(self._waits):
            return
        blamed = [(traffic.waited, source) for part in parts for source, traffic in part.traffic.items()]
        waited, source = max(blamed)
        why = f"{self.sources[source].name} let a reading process wait {waited:.1f} s"
        if waited < seconds / 2:
            why = "no source let a reading process wait as long, decoding took the time: raise data.workers"
        logger.warning(
            "step %d waited %.1f s for samples (%d such steps so far): %s", self._step + 1, seconds, self._waits, why
        )


def _is_telling(count: int) -> bool:
    """The 1st, 2nd, 4th, 8th... of a kind is enough to act on, and cannot flood a log."""
    return count & (count - 1) == 0
