"""What a step is dealt out into, beside what the data, the schedules and the checks make of the same configuration."""

import pytest
import torch

from w2s.config.batching import (
    data_parallel_size,
    divisors,
    fills_pipeline,
    lanes_fit,
    lanes_per_rank,
    micro_batch_size,
    num_kept_patches,
    num_micro_batches,
    num_passes,
    num_stages,
    samples_per_rank,
    samples_per_replica,
)
from w2s.config.layout_checks import check_lanes, check_micro_batches
from w2s.config.load import load
from w2s.config.sections import Config, ParallelConfig
from w2s.data.samples.batch import Batch
from w2s.errors import ConfigError

SIZES = ["train.global_batch=96", "train.micro_batch=16", "parallel.tensor=2", "parallel.pipeline=2"]


def clip(*overrides: str) -> Config:
    return load("clip", ["model=tiny", *SIZES, *overrides])


def test_a_batch_over_twelve_ranks() -> None:
    config = clip()
    assert data_parallel_size(config.parallel, 12) == 3
    assert (samples_per_rank(config, 12), samples_per_replica(config, 12)) == (8, 32)
    assert (micro_batch_size(config, 12), num_micro_batches(config, 12)) == (16, 2)


def test_a_micro_batch_is_not_larger_than_what_a_replica_has() -> None:
    config = clip("train.micro_batch=500")
    assert (micro_batch_size(config, 12), num_micro_batches(config, 12)) == (32, 1)


@pytest.mark.parametrize("micro", [4, 8, 16, 32, 500])
def test_as_many_micro_batches_as_a_batch_is_cut_into(micro: int) -> None:
    config = clip(f"train.micro_batch={micro}")
    whole = Batch(images=torch.zeros(32, 1), keys=[""] * 32, indices=torch.arange(32))
    parts = whole.split(config.train.micro_batch)
    assert (len(parts), len(parts[0])) == (num_micro_batches(config, 12), micro_batch_size(config, 12))


def test_passes_of_a_step() -> None:
    alone = clip("parallel.tensor=1", "parallel.pipeline=1")
    assert [num_passes(alone, 1), num_passes(alone, 2), num_passes(clip(), 1)] == [1, 2, 2]
    assert num_passes(load("clip", ["model=tiny", "clip.two_pass=always"]), 1) == 2
    assert num_passes(load("mim", ["model=tiny"]), 8) == 1


@pytest.mark.parametrize("virtual", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_what_fills_the_pipeline_is_what_the_checks_accept(count: int, virtual: int) -> None:
    config = clip(f"parallel.virtual_pipeline={virtual}", f"train.global_batch={8 * count}", "train.micro_batch=8")
    assert num_stages(config.parallel) == 2 * virtual
    if fills_pipeline(config.parallel, count):
        check_micro_batches(config, 4)
    else:
        with pytest.raises(ConfigError, match="do not fill 2 pipeline stages"):
            check_micro_batches(config, 4)


@pytest.mark.parametrize(("lanes", "batch", "fit"), [(8, 64, True), (8, 4, True), (12, 64, False), (6, 64, False)])
def test_lanes_that_fit_are_those_that_the_checks_accept(lanes: int, batch: int, fit: bool) -> None:
    assert lanes_fit(lanes, batch, 4) is fit
    if fit:
        check_lanes(lanes, batch, 4, ParallelConfig())
    else:
        with pytest.raises(ConfigError, match=f"data.lanes={lanes}"):
            check_lanes(lanes, batch, 4, ParallelConfig())


def test_a_step_reads_no_more_lanes_than_it_has_samples() -> None:
    assert (lanes_per_rank(8, 64, 4), lanes_per_rank(64, 8, 4)) == (2, 2)


def test_kept_patches_are_at_least_one() -> None:
    assert [num_kept_patches(16, dropout) for dropout in (0.0, 0.5, 0.99)] == [16, 8, 1]


def test_divisors_rise() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
