"""A training stage from start to end: the loop, and what surrounds it."""

import time
from collections.abc import Callable

from w2s.checkpoint.export.registry import register_clip
from w2s.checkpoint.own import checkpoint_folders
from w2s.checkpoint.own.in_memory import host_memory
from w2s.checkpoint.own.verifying import recover
from w2s.checkpoint.starts.continued import with_its_start
from w2s.config.checks import doubts
from w2s.config.sections import Config
from w2s.megatron.parallel.process_groups import Ranks
from w2s.processes.host import compute_deterministically
from w2s.run import open_run, recorded, share_sources, test_inputs, training_inputs
from w2s.training.callbacks import load_callbacks
from w2s.training.loop import train
from w2s.training.profiling import Profiler
from w2s.training.stage import Stage
from w2s.training.training_run import TrainingRun


def train_stage(config: Config, build: Callable[[Config, Ranks], Stage]) -> None:
    """Run a training stage, as one rank of it.

    Args:
        config: the stage's configuration.
        build: makes the stage, with weights drawn from the seed.
    """
    started = time.perf_counter()
    if config.train.deterministic:
        compute_deterministically()
    steps = config.train.profiled
    callbacks = [*([Profiler(steps)] if steps else []), *load_callbacks(config.train.callbacks)]
    with open_run(config) as (ranks, heartbeat, folder), host_memory(config, folder, ranks) as memory:
        if memory is None or memory.find(ranks.broadcast(checkpoint_folders.newest_step(folder))) is None:
            recover(folder, ranks, strict=config.checkpoint.strict)
        config = with_its_start(config, folder)
        if ranks.main and checkpoint_folders.latest(folder) is None:
            # Before the model is built, which may take long.
            for doubt in doubts(config, ranks.world_size):
                print(f"warning: {doubt}", flush=True)
        heartbeat.at("finding the shards", long=True)
        sources = share_sources(config, ranks)
        heartbeat.at("building the model", long=True)
        run = TrainingRun(build(config, ranks), config, folder, ranks, heartbeat, memory, sources, callbacks)
        with recorded(run.tracker, folder, config, started, ranks) as metrics:
            if ranks.main:
                run.tracker.inputs([*training_inputs(config, sources), *test_inputs(config)])
            train(run)
            heartbeat.at("finishing", long=True)
            metrics |= run.measure(lambda: run.stage.finish(run.tracker))
    register_clip(config, folder, checkpoint_folders.latest(folder), ranks)
