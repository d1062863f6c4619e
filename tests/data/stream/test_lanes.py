from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.data.shard_files import write_shard, write_shards
from w2s.data.shards.listing import list_shards
from w2s.data.stream.lanes import Lane, LaneState, ShardOrder, window_size

SIZES = [4, 6, 5, 7, 3, 6, 5, 4]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return list_shards(str(write_shards(tmp_path_factory.mktemp("data") / "a", SIZES)))


def open_lane(
    shards: list[str],
    index: int = 0,
    *,
    lanes: int = 2,
    window: int = 5,
    seed: int = 0,
    replacement: bool = False,
    state: LaneState | None = None,
) -> Lane:
    order = ShardOrder(shards=len(shards), lanes=lanes, seed=seed, replacement=replacement)
    return Lane(index, shards, order, window, state or LaneState())


def keys(lane: Lane, count: int) -> list[str]:
    return [lane.next().key for _ in range(count)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_every_epoch_has_every_sample_once(shards: list[str], lanes: int, window: int) -> None:
    epochs: list[Counter[str]] = [Counter(), Counter(), Counter()]
    order = ShardOrder(shards=len(shards), lanes=lanes, seed=3, replacement=False)
    for index in range(lanes):
        lane = open_lane(shards, index, lanes=lanes, window=window, seed=3)
        draws = len(range(index, len(shards), lanes))
        for epoch, seen in enumerate(epochs):
            mine = [order.draw(index, epoch * draws + place) for place in range(draws)]
            seen.update(keys(lane, sum(SIZES[shard] for shard in mine)))
    assert [len(seen) for seen in epochs] == [sum(SIZES)] * 3
    assert {count for seen in epochs for count in seen.values()} == {1}


def test_lanes_seeds_and_epochs_differ(shards: list[str]) -> None:
    total = sum(SIZES)
    lane = open_lane(shards, lanes=1)
    first, second = keys(lane, total), keys(lane, total)
    assert sorted(first) == sorted(second)
    assert first != second
    assert keys(open_lane(shards, lanes=1), total) == first
    assert keys(open_lane(shards, lanes=1, seed=1), total) != first


def test_a_window_shuffles_its_samples_and_no_others(shards: list[str]) -> None:
    plain, shuffled = open_lane(shards, window=1), open_lane(shards, window=5)
    moved = 0
    for _ in range(3):
        straight, mixed = keys(plain, 5), keys(shuffled, 5)
        assert sorted(straight) == sorted(mixed)
        moved += straight != mixed
    assert moved >= 2


def test_first_windows_are_short_and_lanes_never_run_dry_together() -> None:
    """The ends of the windows of 16 lanes, in samples handed out: 16 different places once the windows are full."""
    ends = []
    for lane in range(16):
        sizes = [window_size(256, index, lane, 16) for index in range(8)]
        assert 4 <= sizes[0] <= 8 and sizes[-2:] == [256, 256]
        assert all(after <= 2 * before + 1 for before, after in pairwise(sizes))
        ends.append(sum(sizes) % 256)
    # 256 / 16 = 16 samples apart, up to the rounding of six sizes to whole samples.
    gaps = [after - before for before, after in pairwise(sorted(ends))]
    assert all(abs(gap - 16) <= 3 for gap in gaps)
    assert (window_size(7, 0, 3, 4), window_size(1, 0, 0, 1)) == (7, 1), "too few to begin with fewer"


def test_with_replacement_shards_are_drawn_evenly_and_for_ever(shards: list[str]) -> None:
    order = ShardOrder(shards=8, lanes=2, seed=0, replacement=True)
    draws = Counter(order.draw(lane, index) for lane in range(2) for index in range(2000))
    assert set(draws) == set(range(8))
    # 4,000 draws of 8: 500 each, standard deviation 21.
    assert all(abs(count - 500) < 90 for count in draws.values())
    assert not any(order.ends_epoch(0, index) for index in range(100))
    assert len(keys(open_lane(shards[:1], 1, lanes=2, replacement=True), 30)) == 30


@pytest.mark.parametrize("window", [5, 18])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_lane_resumes_from_any_state(shards: list[str], replacement: bool, window: int) -> None:
    whole = open_lane(shards, replacement=replacement, window=window)
    states, sequence = [], []
    for _ in range(50):
        states.append(whole.state)
        sequence.append(whole.next().key)
    for done, state in enumerate(states):
        assert state.drawn == done
        resumed = open_lane(shards, replacement=replacement, window=window, state=state)
        assert keys(resumed, 50 - done) == sequence[done:]
        assert resumed.state == whole.state


def test_a_damaged_shard_is_drawn_as_one_sample_and_an_empty_one_is_passed_by(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a", [2, 2])
    write_shard(folder / "000002.tar", [])
    (folder / "000003.tar").write_bytes(b"this is not a tar file")
    lane = open_lane(list_shards(str(folder)), lanes=1)
    for _ in range(2):
        damage = Counter(lane.next().damage for _ in range(5))
        assert damage == {"": 4, "shard is damaged": 1}


@pytest.mark.parametrize("replacement", [False, True])
def test_empty_shards_alone_are_bad_samples(tmp_path: Path, replacement: bool) -> None:
    """Reading on for ever would look like a hang."""
    for name in ("0.tar", "1.tar"):
        write_shard(tmp_path / name, [])
    lane = open_lane(list_shards(str(tmp_path)), lanes=1, replacement=replacement)
    assert [lane.next().damage for _ in range(3)] == ["shard is empty"] * 3
