"""The shards of all steps: found before the first step runs, as the last one may read its own hours later."""

from collections.abc import Sequence
from dataclasses import replace

from w2s.config.sections import Config
from w2s.config.suites import load_suite
from w2s.data.builtin.builtin_sets import ensure_builtin, without_left_out
from w2s.data.shards.listing import list_shards
from w2s.data.stream.sources import list_sources
from w2s.evaluation.suite import find_sets


def find_shards(configs: Sequence[Config]) -> None:
    """Build the built-in data sets that are missing, and find all other shards.

    Args:
        configs: those of all runs.

    Raises:
        ConfigError: sources that cannot be.
        DataError: shards that are missing.
    """
    for data in {repr(config.data): config.data for config in configs}.values():
        if data.builtin != "none":
            ensure_builtin(data)
        if data.train or data.phases:
            list_sources(data)
    tests = {(key, shards): config.data for config in configs for key, shards in _tests(config).items()}
    for (key, shards), data in tests.items():
        list_shards(shards, key, allow_pipe=data.allow_pipe)


def _tests(config: Config) -> dict[str, str]:
    if config.eval.suite:
        sets = find_sets(config.eval.suite, load_suite(config.eval.suite), config.eval.root)
    else:
        sets = without_left_out(config.data, config.eval.sets)
    return replace(config.eval, sets=sets).by_key
