"""Shared fixtures."""

import gc
from collections.abc import Iterator

import pytest
import torch

from w2s.config.sections import HardwareConfig, ParallelConfig
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks


def pytest_collection_finish() -> None:
    # Megatron collects garbage with each checkpoint: what imports have made is not looked through every time.
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """One process with Megatron's groups."""
    with process_groups.init_distributed(ParallelConfig(), HardwareConfig(device="cpu")) as ranks:
        yield ranks
