"""Runs of a stage in this process alone, as `train_stage` makes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from w2s.config.sections import Config
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.liveness.heartbeat import Heartbeat
from w2s.run import share_sources
from w2s.training.callbacks import Callback
from w2s.training.stage import Stage
from w2s.training.training_run import TrainingRun

Run = TypeVar("Run", bound=TrainingRun)


def start_run(
    stage: Stage, config: Config, folder: Path, ranks: Ranks, callbacks: Sequence[Callback] = ()
) -> TrainingRun:
    """Begin or resume a run that nobody watches, without checkpoints in memory."""
    return start(TrainingRun, stage, config, folder, ranks, callbacks)


def start(
    kind: type[Run], stage: Stage, config: Config, folder: Path, ranks: Ranks, callbacks: Sequence[Callback] = ()
) -> Run:
    """Begin or resume one of a class."""
    return kind(stage, config, folder, ranks, Heartbeat(), None, share_sources(config, ranks), callbacks)
