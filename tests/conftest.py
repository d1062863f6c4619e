"""Shared fixtures."""

from collections.abc import Iterator

import pytest

from w2s.config.sections import HardwareConfig, ParallelConfig
from w2s.megatron import groups
from w2s.megatron.groups import Ranks


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """One process with Megatron's groups."""
    with groups.start(ParallelConfig(), HardwareConfig(device="cpu")) as ranks:
        yield ranks
