"""The steps of a stage, ours or a peer's, measured by ranks of their own."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from w2s.bench.marks import Marks
from w2s.bench.parts import marked
from w2s.bench.peers.clip import OpenClip
from w2s.bench.peers.masked import TimmMasked
from w2s.bench.synthetic import synthetic_batch
from w2s.config.batching import data_parallel_size, samples_per_rank
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec
from w2s.megatron.parallel import process_groups
from w2s.processes.elastic import launch
from w2s.processes.host import keep_freed_memory, use_huge_pages
from w2s.run import open_stream
from w2s.stages import clip, mim
from w2s.tracking.meters import peak_memory_gib
from w2s.training.stage import train_step

WARM_UP = 3
"""Steps before those that are measured: kernels are chosen or compiled, buffers and optimizer states made."""


@dataclass(frozen=True)
class Job:
    """What a set of ranks measures."""

    config: Config
    micro_batches: tuple[int, ...]
    """Measured one after the other, each with a global batch of one micro-batch a data-parallel rank.

    If there are none, the batch of `config` is measured."""
    data: Literal["synthetic", "real"]
    steps: int
    out: Path
    """The file that gets the measurement."""
    peer: bool = False
    """Measure the peer of the stage instead of ours."""


@dataclass(frozen=True)
class Row:
    """The median step with one batch."""

    micro_batch: int
    global_batch: int
    parts: dict[str, float]
    """Milliseconds by part on rank 0, which add up to the step; empty where the memory did not suffice."""
    memory_gib: float
    """Peak of the fullest rank: what PyTorch allocated on a GPU; on a CPU the resident memory of the process so far."""

    @property
    def milliseconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Measured:
    """What a set of ranks found."""

    device: str
    """Name of the card, or `cpu`."""
    compiled: bool
    """Whether torch.compile has been over the model."""
    parameters: int
    """Numbers that a rank trains."""
    tower_flops: float
    """Operations of a sample's forward pass through the peer's towers, counted there; 0 for ours."""
    rows: list[Row]


class _Configured(Protocol):
    """What reads the sizes of its batches from a configuration."""

    config: Config


@dataclass(frozen=True)
class _Subject:
    """Whose steps are measured."""

    step: Callable[[Batch], object]
    spec: SampleSpec
    parameters: int
    configured: _Configured
    compiled: bool = False
    tower_flops: float = 0.0


def measure(job: Job, ranks: int) -> Measured:
    """Let new processes do a job.

    Raises:
        W2SError: a rank failed.
    """
    launch(_run, job, ranks)
    measured = json.loads(job.out.read_text(encoding="utf-8"))
    return Measured(**{**measured, "rows": [Row(**row) for row in measured["rows"]]})


def with_batch(config: Config, micro_batch: int, world_size: int) -> Config:
    """Return a configuration whose global batch is one micro-batch a data-parallel rank."""
    replicas = data_parallel_size(config.parallel, world_size)
    return replace(config, train=replace(config.train, micro_batch=micro_batch, global_batch=micro_batch * replicas))


def _run(job: Job) -> None:
    """A rank."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print does not get between the figures
    keep_freed_memory()
    use_huge_pages()
    (_run_peer if job.peer else _run_ours)(job)


def _run_ours(job: Job) -> None:
    config = job.config
    with process_groups.init_distributed(config.parallel, config.hardware) as ranks:
        stage = (mim.MaskedStage if config.stage == "mim" else clip.ContrastiveStage)(config, ranks)
        marks = Marks(ranks.device)
        subject = _Subject(
            step=lambda batch: train_step(stage, batch, factor=1.0),
            spec=stage.spec,
            parameters=sum(_size(part) for tower in stage.towers.values() for part in tower.chunks),
            configured=stage,
        )
        with marked(stage, marks):
            rows = _measure_rows(subject, job, marks, ranks.device, ranks.data_reader_rank, ranks.world_size)
        memories = ranks.gather([row.memory_gib for row in rows])
        rows = [replace(row, memory_gib=max(most)) for row, most in zip(rows, zip(*memories, strict=True), strict=True)]
        if ranks.main:
            _write(job, _measured(subject, ranks.device, rows))


def _run_peer(job: Job) -> None:
    """A peer needs none of our process groups, and on a CPU nothing that stands in for CUDA."""
    device = process_groups.local_device(job.config.hardware)
    marks = Marks(device)
    peer = (TimmMasked if job.config.stage == "mim" else OpenClip)(job.config, device)
    subject = _Subject(
        step=lambda batch: peer.step(batch, marks),
        spec=peer.spec,
        parameters=_size(peer.model),
        configured=peer,
        compiled=peer.compiled,
        tower_flops=peer.forward_flops(),
    )
    _write(job, _measured(subject, device, _measure_rows(subject, job, marks, device, reader=0, world_size=1)))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measured(subject: _Subject, device: torch.device, rows: list[Row]) -> Measured:
    return Measured(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        compiled=subject.compiled,
        parameters=subject.parameters,
        tower_flops=subject.tower_flops,
        rows=rows,
    )


def _write(job: Job, measured: Measured) -> None:
    job.out.write_text(json.dumps(asdict(measured)), encoding="utf-8")


def _measure_rows(
    subject: _Subject, job: Job, marks: Marks, device: torch.device, reader: int, world_size: int
) -> list[Row]:
    rows = []
    for config in [with_batch(job.config, size, world_size) for size in job.micro_batches] or [job.config]:
        subject.configured.config = config
        try:
            with _batches(subject.spec, job.data, config, reader, world_size) as next_batch:
                parts = _median_step(subject.step, next_batch, marks, job.steps)
        except torch.OutOfMemoryError:
            if world_size > 1:  # the others wait for this rank
                raise
            parts = {}
        rows.append(Row(config.train.micro_batch, config.train.global_batch, parts, peak_memory_gib(device)))
    return rows


@contextmanager
def _batches(
    spec: SampleSpec, data: Literal["synthetic", "real"], config: Config, reader: int, world_size: int
) -> Iterator[Callable[[], Batch]]:
    """What gives this rank's share of a global batch."""
    if data == "synthetic":
        vocabulary, size = config.model.text.vocab_size, samples_per_rank(config, world_size)
        batch = synthetic_batch(spec, size, vocabulary, seed=reader)
        yield lambda: batch
    else:
        with closing(open_stream(config, spec, rank=reader, size=world_size)) as stream:
            yield stream.next


def _median_step(
    step: Callable[[Batch], object], next_batch: Callable[[], Batch], marks: Marks, steps: int
) -> dict[str, float]:
    """The parts of the step whose time is the median (of an even number, the lower one of the middle)."""
    for index in range(WARM_UP + steps):
        if index == WARM_UP:
            marks.read()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        with marks.step():
            with marks.part("data"):
                batch = next_batch()
            step(batch)
    by_time = sorted(marks.read(), key=lambda parts: sum(parts.values()))
    return by_time[(steps - 1) // 2]
