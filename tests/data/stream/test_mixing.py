"""Several sources with weights, and phases."""

import math
import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.shard_files import write_shards
from tests.data.streams import Group
from w2s.config.sections import DataConfig, PhaseConfig
from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec
from w2s.data.stream.phases import Phase, phase_at, plan_phases
from w2s.data.stream.sources import list_sources
from w2s.data.stream.stream import Stream
from w2s.errors import ConfigError, DataError

SPEC = SampleSpec(image_size=8, grid=4, num_kept_patches=8, image_key="png", crop_scale=(0.9, 1.0), flip=False)
BATCH = 16
STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_shards(root / "big", [11, 9, 10, 12, 8, 7, 9, 10])
    write_shards(root / "small", [3, 2, 4, 3, 2, 5, 3, 1])
    return root


def mixed(folder: Path, **changes: Any) -> DataConfig:
    train = f"{folder}/big::{folder}/small"
    settings: dict[str, Any] = {"train": train, "weights": [0.8, 0.2], "lanes": 8, "shuffle": 5, "workers": 0}
    return DataConfig(**(settings | changes))


def phased(folder: Path, **changes: Any) -> DataConfig:
    phases = [
        PhaseConfig(samples=4 * BATCH, train=f"{folder}/big", patch_dropout=0.5),
        PhaseConfig(samples=2 * BATCH, patch_dropout=0.0, crop_scale=(0.3, 0.4)),
        PhaseConfig(train=f"{folder}/small", patch_dropout=0.75),
    ]
    return mixed(folder, phases=phases, **changes)


def open_group(data: DataConfig, *, size: int = 1, workers: int = 0, position: Any = None) -> Group:
    return Group(replace(data, workers=workers), SPEC, batch=BATCH, seed=1, size=size, position=position)


def read(data: DataConfig, steps: int, **options: Any) -> tuple[list[Batch], Any]:
    with closing(open_group(data, **options)) as group:
        return group.read(steps), group.position()


def keys(batches: list[Batch]) -> list[list[str]]:
    return [batch.keys for batch in batches]


@pytest.mark.parametrize("make", [mixed, phased])
def test_batches_and_resumes_do_not_depend_on_ranks_and_workers(folder: Path, make: Any) -> None:
    whole, _ = read(make(folder), STEPS)
    shapes = [None if batch.kept is None else batch.kept.shape for batch in whole]
    for size, workers, new_size, new_workers in ((2, 3, 4, 1), (4, 0, 1, 3)):
        first, position = read(make(folder), 5, size=size, workers=workers)
        assert keys(first) == keys(whole[:5])
        rest, _ = read(make(folder), STEPS - 5, size=new_size, workers=new_workers, position=position)
        assert keys(rest) == keys(whole[5:])
        assert [None if batch.kept is None else batch.kept.shape for batch in rest] == shapes[5:]


def test_resumes_of_weighted_sources_at_twenty_random_places(folder: Path) -> None:
    positions, batches = [], []
    data = phased(folder, shuffle=20)
    with closing(open_group(data)) as group:
        for _ in range(16):
            positions.append(group.position())
            batches += group.read(1)
    draw = random.Random(2)
    for _ in range(20):
        done = draw.randrange(14)
        rest, position = read(data, 2, size=draw.choice([1, 2, 4]), position=positions[done])
        assert keys(rest) == keys(batches[done : done + 2])
        # Sources that were not read again are where they were.
        assert position == positions[done + 2]


def test_weights_are_sample_probabilities() -> None:
    """50,000 samples: 10,000 of the small source expected, standard deviation sqrt(50,000 x 0.8 x 0.2) = 89."""
    phase = Phase(0, (0.8, 0.2), SPEC)
    drawn = Counter(phase.draw(3, index) for index in range(50_000))
    assert abs(drawn[1] - 10_000) < 4 * math.sqrt(50_000 * 0.8 * 0.2)
    # A run that draws otherwise in its lanes would show there: each lane has 50,000 / 8 samples, deviation 32.
    by_lane = Counter(index % 8 for index in range(50_000) if phase.draw(3, index) == 1)
    assert all(abs(count - 1250) < 4 * math.sqrt(6250 * 0.8 * 0.2) for count in by_lane.values())


def test_the_stream_draws_and_counts_by_the_weights(folder: Path) -> None:
    with closing(Stream(mixed(folder), SPEC, global_batch=BATCH, seed=1, rank=0, size=1)) as stream:
        seen = Counter[int]()
        for step in range(60):
            batch = stream.next()
            assert batch.indices[0] == step * BATCH
            seen.update(stream._phases[0].draw(1, index) for index in batch.indices.tolist())
        assert stream.seen == {"big": seen[0], "small": seen[1]}
        figures = stream.metrics({**stream.counts(), "bad/image is missing": 2})
        assert figures["source/small/samples"] == seen[1]
        assert figures["source/small/share"] == seen[1] / 960
        assert figures["source/small/weight"] == pytest.approx(0.2)
        assert figures["bad/image is missing"] == 2
        # 960 draws: standard deviation 12.4 around 192.
        assert abs(seen[1] - 192) < 50


def test_sources_of_equal_shards_go_different_ways(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(tmp_path / name, [6] * 4)
    data = DataConfig(train=f"{tmp_path}/a::{tmp_path}/b", weights=[0.5, 0.5], lanes=1, shuffle=1, workers=0)
    with closing(Stream(data, SPEC, global_batch=1, seed=0, rank=0, size=1)) as stream:
        ways: list[list[str]] = [[], []]
        for index in range(60):
            ways[stream._phases[0].draw(0, index)] += stream.next().keys
    assert ways[0][:20] != ways[1][:20]


def test_without_weights_sources_are_one_pool(folder: Path) -> None:
    data = mixed(folder, weights=[], lanes=1)
    total = 76 + 23
    with closing(Stream(data, SPEC, global_batch=1, seed=1, rank=0, size=1)) as stream:
        seen = Counter(stream.next().keys[0] for _ in range(total))
        assert len(stream.sources) == 1
        assert set(stream.metrics(stream.counts())) == {"source/small/mb_per_second", "source/small/wait"}
    # Both folders have keys SHARD-NUMBER; the small one's are a part of the big one's.
    assert sum(seen.values()) == total
    assert set(seen.values()) == {1, 2}


def test_phases_change_sources_crop_and_patch_dropout(folder: Path) -> None:
    batches, position = read(phased(folder), STEPS)
    kept = [0 if batch.kept is None else batch.kept.shape[1] for batch in batches]
    assert kept == [8] * 4 + [0] * 2 + [4] * 3
    sources = list_sources(phased(folder))
    phases = plan_phases(phased(folder), SPEC, BATCH)
    assert [source.name for source in sources] == ["big", "small"]
    assert [phase.first for phase in phases] == [0, 64, 96]
    assert [phase.weights for phase in phases] == [(1.0, 0.0), (0.8, 0.2), (0.0, 1.0)]
    assert [phase.spec.crop_scale for phase in phases] == [(0.9, 1.0), (0.3, 0.4), (0.9, 1.0)]
    assert phase_at(phases, 63) is phases[0]
    assert phase_at(phases, 64) is phases[1]
    assert phase_at(phases, 10**9) is phases[2]
    lanes = position["lanes"].values()
    assert sum(lane["0"]["drawn"] for lane in lanes) + sum(lane["1"]["drawn"] for lane in lanes) == STEPS * BATCH


def test_a_source_of_two_phases_resumes_where_it_stood(folder: Path) -> None:
    half = [PhaseConfig(samples=2 * BATCH, train=f"{folder}/big"), PhaseConfig(train=f"{folder}/big")]
    whole, _ = read(mixed(folder, train=f"{folder}/big", weights=[]), 4)
    phased, _ = read(mixed(folder, phases=half), 4)
    assert keys(phased) == keys(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [0.5, 0.3, 0.2]}, r"data.weights=\[0.5, 0.3, 0.2\] are 3 for the 2 different sources of .*: give"),
        ({"phases": [PhaseConfig(samples=20), PhaseConfig()]}, "phase 1 has samples=20, .* use 16"),
        ({"phases": [PhaseConfig(samples=0), PhaseConfig()]}, "phase 1 has samples=0, .* use 16"),
        ({"lanes": 16}, "data.lanes=16 needs as many shards, .*/big has 8: use data.lanes=8"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stream(mixed(folder, **changes), SPEC, global_batch=BATCH, seed=1, rank=0, size=1)


def test_other_weights_are_another_order(folder: Path) -> None:
    _, position = read(mixed(folder), 1)
    with pytest.raises(DataError, match=r"cannot continue with data.weights=\[\[0, 0.7, 0.3\]\]: the run began with"):
        read(mixed(folder, weights=[0.7, 0.3]), 1, position=position)


def test_a_source_smaller_than_a_batch_comes_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "tiny", [1, 2])
    data = DataConfig(train=f"{tmp_path}/tiny", lanes=2, shuffle=4, workers=2)
    with closing(Stream(data, SPEC, global_batch=64, seed=0, rank=0, size=1)) as stream:
        seen = Counter(stream.next().keys)
    assert set(seen) == {"00-000", "01-000", "01-001"}
    assert sum(seen.values()) == 64
