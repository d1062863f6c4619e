"""A training stage from start to end: the loop, and what surrounds it."""

import time
from collections.abc import Callable

from w2s.callbacks import load_callbacks
from w2s.checkpoint import store
from w2s.checkpoint.continued import with_its_start
from w2s.checkpoint.memory import host_memory
from w2s.checkpoint.verifying import recover
from w2s.config.doubts import doubts
from w2s.config.sections import Config
from w2s.host import compute_deterministically
from w2s.megatron.groups import Ranks
from w2s.profiling import Profiler
from w2s.registering import register_clip
from w2s.run import open_run, recorded, share_sources, test_inputs, training_inputs
from w2s.trainer import Trainer
from w2s.training.stage import Stage


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
    with open_run(config) as (ranks, pulse, run), host_memory(config, run, ranks) as memory:
        if memory is None or memory.find(ranks.share(store.newest_step(run))) is None:
            recover(run, ranks, strict=config.checkpoint.strict)
        config = with_its_start(config, run)
        # Before the model is built, which may take long.
        for doubt in doubts(config, ranks.world_size) if ranks.main and store.latest(run) is None else []:
            print(f"warning: {doubt}", flush=True)
        pulse.at("finding the shards", long=True)
        sources = share_sources(config, ranks)
        pulse.at("building the model", long=True)
        trainer = Trainer(build(config, ranks), config, run, ranks, pulse, memory, sources, callbacks=callbacks)
        with recorded(trainer.tracker, run, config, started, ranks) as metrics:
            _tell_resumed(trainer)
            if ranks.main:
                trainer.tracker.inputs([*training_inputs(config, sources), *test_inputs(config)])
            trainer.train()
            pulse.at("finishing", long=True)
            metrics |= trainer.finish()
    register_clip(config, run, store.latest(run), ranks)


def _tell_resumed(trainer: Trainer) -> None:
    """Say where the run goes on, and what became of it."""
    if trainer.memory is not None and trainer.memory.meta is not None:
        trainer.tracker.message(f"goes on at step {trainer.step}, from the memory of the hosts")
    elif trainer.step and trainer.parent:
        trainer.tracker.message(f"goes on at step {trainer.step}, begun from {trainer.parent}")
    trainer.tell_news()
