"""What a stage finds when it begins, and leaves when it ends: ranks, folder, samples; inputs, result, status."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from w2s.checkpoint.find import find_any, is_finished, unfinished_folder
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.config.sections import Config
from w2s.data.builtin.builtin_sets import ensure_builtin
from w2s.data.samples.sample import SampleSpec
from w2s.data.shards.listing import list_shards, shards_digest
from w2s.data.stream.position import Position
from w2s.data.stream.sources import Source, find_sources
from w2s.data.stream.stream import Stream
from w2s.errors import CheckpointError, StopRun, UserError
from w2s.files import write_text
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.liveness.heartbeat import Heartbeat
from w2s.processes.liveness.heartbeat_sender import watched
from w2s.processes.liveness.owner import owned
from w2s.processes.stopping import stop_at_once
from w2s.tracking.meters import peak_memory_gib
from w2s.tracking.mlflow.datasets import DataInput
from w2s.tracking.tracker import Tracker

STACKS = "stacks.txt"
"""File of a run folder with the Python stacks of all ranks, when they stalled."""


@contextmanager
def open_run(config: Config) -> Iterator[tuple[Ranks, Heartbeat, Path]]:
    """Be a rank of a run, watched, with its data built: give the ranks, where to note what is done, and its folder."""
    with (
        stop_at_once(),
        process_groups.init_distributed(config.parallel, config.hardware) as ranks,
        watched(config.hardware, ranks) as heartbeat,
        owned_folder(config, ranks) as run,
    ):
        heartbeat.report = run / STACKS
        if config.data.builtin != "none":
            ranks.on_main(lambda: ensure_builtin(config.data))
        yield ranks, heartbeat, run


@contextmanager
def owned_folder(config: Config, ranks: Ranks) -> Iterator[Path]:
    """Own the folder of this run, and give it; every rank calls.

    A named run is that run. A run without a name is the interrupted one of the same configuration, otherwise a new one.
    """
    folder = ranks.on_main(lambda: unfinished_folder(config))
    if is_finished(folder):
        raise UserError(f"run.name={config.run.name}: {folder} is finished: choose another name")
    with owned(folder, ranks):
        yield folder


def share_sources(config: Config, ranks: Ranks) -> list[Source]:
    """Find the sources of the training samples: one rank lists and checks the shards, all get the result.

    Raises:
        ConfigError: the sources are not what the configuration says; on every rank.
        DataError: shards that are missing or lack something; on every rank.
    """
    batch, captions = config.train.global_batch, config.stage == "clip"
    return ranks.on_main(lambda: find_sources(config.data, batch, ranks.world_size, captions=captions))


def open_stream(
    config: Config,
    spec: SampleSpec,
    *,
    rank: int,
    size: int,
    position: Position | None = None,
    sources: Sequence[Source] | None = None,
) -> Stream:
    """Open the training samples of one of `size` readers, where an earlier stream stood or at the beginning."""
    return Stream(
        config.data,
        spec,
        global_batch=config.train.global_batch,
        seed=config.run.seed,
        rank=rank,
        size=size,
        position=position,
        sources=sources,
    )


def origins(config: Config, parent: str | None) -> dict[str, str]:
    """Tell what a run comes from: its teachers, the checkpoints that it began with, and the MLflow runs of all these.

    Args:
        config: the run's configuration.
        parent: the checkpoint, or `VISION and TEXT`, that its weights come from; None for none.
    """
    teachers, root = config.stage_teachers, Path(config.run.root).expanduser()
    sources = parent.split(" and ") if parent else []
    sources += [each.source.removeprefix("w2s:") for each in teachers if each.source.startswith("w2s:")]
    runs: dict[str, None] = {}
    for source in sources:
        with suppress(CheckpointError):  # an interrupted run continues without what it was begun from, too
            run_id = read_meta(find_any(source, root, key="parent")).mlflow_run_id
            runs |= {run_id: None} if run_id else {}
    facts = {
        "teacher": ", ".join(each.source for each in teachers),
        "parent_checkpoint": parent,
        "parent_runs": ", ".join(runs),
    }
    return {name: text for name, text in facts.items() if text}


def counted(shapes: Mapping[str, Sequence[int]]) -> str:
    """Tell the parameters of weights whose names begin with that of their tower: in all, and of each tower."""
    towers: dict[str, int] = {}
    for name, shape in shapes.items():
        tower = name.partition(".")[0]
        towers[tower] = towers.get(tower, 0) + math.prod(shape)
    parts = ", ".join(f"{name} {count:,}" for name, count in towers.items())
    return f"{sum(towers.values()):,} ({parts})"


def training_inputs(config: Config, sources: Sequence[Source]) -> list[DataInput]:
    """Describe the sources of the training samples for MLflow."""
    names = ["training"] if len(sources) == 1 else [source.name for source in sources]
    return [
        DataInput(f"{config.data.name} {name}", source.pattern, source.digest, "training")
        for name, source in zip(names, sources, strict=True)
    ]


def test_inputs(config: Config) -> list[DataInput]:
    """Describe the sets that a stage is measured on."""
    contexts = {"eval.shards": "evaluation", "eval.knn_shards": "neighbours"}
    contexts |= {f"eval.sets.{name}": f"evaluation {name}" for name in config.eval.sets}
    return [_data_input(config, key, shards, contexts[key]) for key, shards in config.eval.by_key.items()]


def _data_input(config: Config, key: str, source: str, context: str) -> DataInput:
    """Describe the shards of a configuration key for MLflow: the digest is over their names and sizes in bytes."""
    digest = shards_digest(list_shards(source, key, allow_pipe=config.data.allow_pipe))
    return DataInput(f"{config.data.name} {context}", source, digest, context)


@contextmanager
def tracked(tracker: Tracker) -> Iterator[None]:
    """End the tracked run as it ended: FINISHED, KILLED when it was asked to stop, otherwise FAILED.

    What ended it is what the user is told, also where a full disk takes no report.
    """
    try:
        yield
    except StopRun:
        with suppress(UserError):
            tracker.finish("KILLED")
        raise
    except BaseException:
        with suppress(UserError):
            tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")


@contextmanager
def recorded(tracker: Tracker, run: Path, config: Config, started: float, ranks: Ranks) -> Iterator[dict[str, float]]:
    """Track a run and write its result: give the metrics, which the work inside fills.

    Args:
        tracker: follows the run.
        run: its folder.
        config: its configuration.
        started: when its work began, by `time.perf_counter`.
        ranks: this process among all.

    Raises:
        UserError: the result cannot be written.
    """
    metrics: dict[str, float] = {}
    with tracked(tracker):
        tracker.message(f"run folder: {run}")
        yield metrics
        _write_result(run, config, metrics, started, ranks)


def _write_result(run: Path, config: Config, metrics: Mapping[str, float], started: float, ranks: Ranks) -> None:
    """Mark a run as finished: result.json holds its stage, metrics, seconds of computing and peak memory in GiB."""
    if ranks.main:
        result = {
            "stage": config.stage,
            "metrics": dict(metrics),
            "seconds": time.perf_counter() - started,
            "peak_memory_gib": peak_memory_gib(ranks.device),
        }
        write_text(run / "result.json", json.dumps(result, indent=1))
