"""One rank of a rehearsal: the real model, optimizer, stage and steps, without numbers and without the other ranks."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from w2s.bench.marks import Parts
from w2s.bench.parts import marked
from w2s.bench.synthetic import synthetic_batch
from w2s.compat import DataDependentOutputException, DynamicOutputShapeException
from w2s.config.batching import samples_per_rank
from w2s.config.sections import Config
from w2s.megatron.checkpoint import state
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.planning.time.cards import Card
from w2s.processes.failure import describe
from w2s.rehearsal.repeated_layers import RepeatedLayers
from w2s.rehearsal.repeated_micro_batches import RepeatedMicroBatches
from w2s.rehearsal.repetition import Repetition
from w2s.rehearsal.stand_ins.device import GPU, FakeGpu, stand_in_for_cuda
from w2s.rehearsal.stand_ins.fake_group import Recorder, joined
from w2s.rehearsal.stand_ins.fp8 import stand_in_for_transformer_engine
from w2s.rehearsal.stand_ins.meter import Meter
from w2s.rehearsal.stand_ins.sharding import sharded_as_on_gpus
from w2s.rehearsal.stand_ins.streams import Streams
from w2s.rehearsal.stand_ins.triton import stand_in_for_triton
from w2s.rehearsal.stand_ins.where import line_of
from w2s.rehearsal.tape import Tape
from w2s.stages import clip, mim
from w2s.training.stage import Stage, train_step


@dataclass(frozen=True)
class Job:
    """A rank to be rehearsed."""

    config: Config
    rank: int
    world_size: int
    steps: int
    card: Card


@dataclass
class RankReport:
    """What a rank of a rehearsal did."""

    tape: Tape
    built: int = 0
    """Bytes of its GPU before the first step."""
    peak: int = 0
    """Most bytes of its GPU in the last step."""
    fullest: str = ""
    """The line of code at the peak."""
    parts: dict[str, int] = field(default_factory=dict)
    """What the peak is made of."""
    written: int = 0
    """Bytes that it writes into a checkpoint."""
    failure: str = ""
    """The line that the run would end with."""
    where: str = ""
    """The line of code that failed."""
    needs_numbers: bool = False
    """Whether the run would wait there for the GPU's numbers, which a rehearsal has not."""


def rehearse(job: Job) -> RankReport:
    """Be a rank for some steps, in a process of its own."""
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copies ask for it
    logging.getLogger("w2s").setLevel(logging.ERROR)  # such as that a teacher has no weights
    os.environ.update(RANK=str(job.rank), WORLD_SIZE=str(job.world_size), LOCAL_RANK="0")
    parts, report = Parts(), RankReport(Tape(job.rank))
    meter, streams = Meter(report.tape, job.card, parts), Streams(report.tape)
    recorder = Recorder(report.tape, parts, streams)
    with (
        joined(recorder, job.rank, job.world_size),
        process_groups.initialize_groups(job.config.parallel, GPU) as ranks,
        sharded_as_on_gpus(),
        stand_in_for_cuda(meter, streams),
        stand_in_for_triton(meter.launched),
        stand_in_for_transformer_engine(meter),
        shortened(job.config, Repetition(recorder, meter)),
    ):
        try:
            _steps(job, ranks, meter, parts, report)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            report.failure, report.where = f"{error.func} waits for the GPU, to see its numbers", line_of(error)
            report.needs_numbers = True
        except Exception as error:  # whatever the run would end with
            report.failure, report.where = describe(error)[0], line_of(error)
    return report


def shortened(config: Config, repetition: Repetition) -> AbstractContextManager[None]:
    """Return a context in which equal micro-batches of a pass are repeated."""
    if config.parallel.pipeline == 1:
        return RepeatedMicroBatches(repetition).on()
    if config.mim.layers:
        return nullcontext()  # its stacks give out more than one tensor
    return RepeatedLayers(repetition).on()


def _steps(job: Job, ranks: Ranks, meter: Meter, parts: Parts, report: RankReport) -> None:
    with _on_gpu(meter):
        stage = _build(job.config, ranks)
    report.built = meter.now
    batch = synthetic_batch(stage.spec, samples_per_rank(job.config, job.world_size), job.config.model.text.vocab_size)
    with marked(stage, parts), _on_gpu(meter):
        for _ in range(job.steps):
            report.tape.steps.append(len(report.tape.events))
            meter.start_peak()
            train_step(stage, batch, 1.0)
    report.peak, report.parts, report.fullest = meter.peak, dict(meter.parts), meter.where
    taken = len(report.tape.events)
    with _on_gpu(meter):
        report.written = state.written_bytes(stage.towers, stage.optimizer, stage.extra_state())
    del report.tape.events[taken:]  # a checkpoint is not part of a step


@contextmanager
def _on_gpu(meter: Meter) -> Iterator[None]:
    with meter.fake, meter, FakeGpu(meter):
        yield


def _build(config: Config, ranks: Ranks) -> Stage:
    return (mim.MaskedStage if config.stage == "mim" else clip.ContrastiveStage)(config, ranks)
