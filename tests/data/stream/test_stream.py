import json
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import w2s.data.samples.sample
from tests.data.shard_files import bomb, encode, good_sample, noise, smooth_photo, write_shards
from tests.data.streams import Group, assert_same
from w2s.config.sections import DataConfig
from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec
from w2s.data.stream.position import merge_positions
from w2s.data.stream.stream import Stream
from w2s.errors import ConfigError, DataError

SIZES = [5, 7, 6, 8, 5, 9, 6, 7]
BAD = {
    "00-001": {"png": b"\0" * 200, "txt": b"zeros"},
    "01-003": {"png": encode(smooth_photo(), "JPEG")[:3000], "txt": b"cut"},
    "03-000": {"png": encode(noise(1))},
    "05-008": {"png": bomb(), "txt": b"bomb"},
    "06-002": {"txt": b"no image"},
}
REASONS = {
    "image cannot be decoded": 2,
    "caption is missing": 1,
    "image is too large": 1,
    "image is missing": 1,
}
SPEC = SampleSpec(
    image_size=16,
    grid=4,
    teacher_sizes=(24,),
    masked_patches=6,
    min_block=2,
    num_kept_patches=8,
    layers=3,
    drop_path=0.5,
    context_length=8,
    image_key="png",
)
STEPS = 8
BATCH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train", SIZES, BAD)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Batch]:
    """The batches of one uninterrupted run in one process."""
    with closing(open_group(folder)) as group:
        return group.read(STEPS)


def config(folder: Path, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {"train": str(folder), "lanes": 8, "shuffle": 4, "workers": 0, "max_bad_fraction": 1.0}
    return DataConfig(**(settings | changes))


def open_stream(folder: Path, rank: int = 0, size: int = 1, position: Any = None, **changes: Any) -> Stream:
    data = config(folder, **changes)
    return Stream(data, SPEC, global_batch=BATCH, seed=5, rank=rank, size=size, position=position)


def open_group(folder: Path, size: int = 1, position: Any = None, **changes: Any) -> Group:
    return Group(config(folder, **changes), SPEC, batch=BATCH, seed=5, size=size, position=position)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batches_do_not_depend_on_ranks_and_workers(
    folder: Path, whole: list[Batch], size: int, workers: int
) -> None:
    with closing(open_group(folder, size, workers=workers)) as group:
        assert_same(group.read(STEPS), whole)


def test_a_batch_has_the_shapes_and_types_it_promises(whole: list[Batch]) -> None:
    batch = whole[1]
    fields = {n: (t.dtype, tuple(t.shape)) for n, t in vars(batch).items() if isinstance(t, torch.Tensor)}
    assert fields == {
        "images": (torch.uint8, (16, 3, 16, 16)),
        "masks": (torch.bool, (16, 16)),
        "kept": (torch.int64, (16, 8)),
        "branch_scales": (torch.float32, (16, 3, 2)),
        "tokens": (torch.int64, (16, 8)),
        "caption_hashes": (torch.int64, (16,)),
        "indices": (torch.int64, (16,)),
    }
    assert [view.shape for view in batch.teacher_images] == [(16, 3, 24, 24)]
    assert batch.masks is not None
    assert batch.masks.sum(dim=1).tolist() == [6] * 16
    assert batch.indices.tolist() == list(range(16, 32))


def test_equal_captions_have_equal_hashes(whole: list[Batch]) -> None:
    for batch in whole:
        assert batch.caption_hashes is not None
        texts = [good_sample(int(key[:2]) * 1000 + int(key[3:]))["txt"] for key in batch.keys]
        by_text: dict[bytes, set[int]] = {}
        for text, digest in zip(texts, batch.caption_hashes.tolist(), strict=True):
            by_text.setdefault(text, set()).add(digest)
        assert all(len(digests) == 1 for digests in by_text.values())
        assert len(set.union(*by_text.values())) == len(by_text)


@pytest.mark.parametrize(("done", "size", "workers", "new_size", "new_workers"), [(1, 4, 1, 1, 0), (5, 2, 0, 4, 2)])
def test_a_resume_with_other_ranks_and_workers_resumes_in_the_middle_of_windows(
    folder: Path, whole: list[Batch], done: int, size: int, workers: int, new_size: int, new_workers: int
) -> None:
    with closing(open_group(folder, size, workers=workers)) as group:
        group.read(done)
        position = group.position()
    assert position["step"] == done
    assert any(lane["0"]["taken"] % 4 for lane in position["lanes"].values())
    with closing(open_group(folder, new_size, position, workers=new_workers)) as group:
        assert_same(group.read(STEPS - done), whole[done:])
        assert group.position()["step"] == STEPS


@pytest.mark.parametrize("read_ahead_mb", [0.01, 100])
def test_resumes_at_twenty_random_places_and_other_sizes(tmp_path: Path, read_ahead_mb: float) -> None:
    """Lanes whose windows grow and end with epochs, whatever is read ahead; every rank reads two steps on."""
    folder = write_shards(tmp_path / "a", [31, 17, 40, 23, 28, 35, 19, 26])
    changes = {"shuffle": 20, "read_ahead_mb": read_ahead_mb}
    positions, batches = [], []
    with closing(open_group(folder, **changes)) as group:
        for _ in range(24):
            positions.append(group.position())
            batches += group.read(1)
    draw = random.Random(1)
    for _ in range(20):
        done, size = draw.randrange(22), draw.choice([1, 2, 4, 8])
        with closing(open_group(folder, size, positions[done], **changes)) as group:
            assert_same(group.read(2), batches[done : done + 2])
            assert group.position() == positions[done + 2]


def test_a_closed_stream_leaves_no_threads(folder: Path) -> None:
    before = set(threading.enumerate())
    with closing(open_stream(folder)) as stream:
        stream.next()
        threads = set(threading.enumerate()) - before
        assert len(threads) == 8
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


def test_a_resume_decodes_nothing_twice(
    folder: Path, whole: list[Batch], decoded: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_stream(folder)) as stream:
        for _ in range(3):
            stream.next()
        position = stream.position()
    before = decoded()
    with closing(open_stream(folder, position=position)) as stream:
        assert decoded() == before
        assert_same([stream.next()], whole[3:4])
        # Samples without an image or a caption are refused before anything is decoded.
        undecoded = stream.bad["image is missing"] + stream.bad["caption is missing"]
        assert decoded() - before == BATCH + sum(stream.bad.values()) - undecoded


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Count the images that are decoded in this process."""
    count = 0
    original = w2s.data.samples.sample.decode_crop

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments, **options)

    monkeypatch.setattr("w2s.data.samples.sample.decode_crop", counting)
    yield lambda: count


def test_bad_samples_are_skipped_and_counted_and_no_other_is_lost(folder: Path) -> None:
    seen: Counter[str] = Counter()
    with closing(open_stream(folder, workers=2)) as stream:
        for step in range(1, 13):
            seen.update(stream.next().keys)
            drawn = sum(lane["0"]["drawn"] for lane in stream.position()["lanes"].values())
            assert step * BATCH + sum(stream.bad.values()) == drawn
    # A lane has one shard here, and 24 samples of each lane are more than the 9 of the largest shard.
    assert set(seen) == {f"{shard:02d}-{n:03d}" for shard, size in enumerate(SIZES) for n in range(size)} - set(BAD)
    assert set(stream.bad) == set(REASONS)


def test_skips_are_logged_at_a_falling_rate(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="w2s.data.stream.stream"), closing(open_stream(folder)) as stream:
        for _ in range(40):
            stream.next()
    lines = [record.getMessage() for record in caplog.records if "image cannot be decoded" in record.getMessage()]
    assert stream.bad["image cannot be decoded"] > 8
    assert len(lines) == stream.bad["image cannot be decoded"].bit_length()
    assert any("00-001" in line and "000000.tar" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_stream_in_one_line(folder: Path, workers: int) -> None:
    with closing(open_stream(folder, workers=workers, max_bad_fraction=0.005)) as stream:
        with pytest.raises(DataError, match=r"6 of the last \d+ samples could not be read") as caught:
            for _ in range(40):
                stream.next()
        assert "\n" not in str(caught.value)


def test_lanes_may_outnumber_the_batch(folder: Path) -> None:
    def batches(size: int, workers: int) -> list[Batch]:
        with closing(Group(config(folder, workers=workers), SPEC, batch=4, seed=5, size=size)) as group:
            return group.read(6)

    assert_same(batches(1, 0), batches(2, 3))


def test_with_replacement_fewer_shards_than_lanes_will_do(folder: Path) -> None:
    two = f"{folder}/{{000000..000001}}.tar"
    with pytest.raises(ConfigError, match=r"data.lanes=8 needs as many shards, data.train has 2: use data.lanes=2"):
        open_stream(folder, train=two)
    with closing(open_stream(folder, train=two, replacement=True)) as stream:
        assert len(stream.next()) == BATCH


def test_workers_know_nothing_of_the_trainers_torch(folder: Path, whole: list[Batch]) -> None:
    """The parent computed with threads and has a torch function mode on; workers run in plain torch all the same."""

    class Recorder(TorchFunctionMode):
        pids: set[int] = set()

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.pids.add(os.getpid())
            if os.getpid() != parent:
                raise RuntimeError("the mode reached a worker")
            return function(*args, **(kwargs or {}))

    parent = os.getpid()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(300, 300) @ torch.randn(300, 300)
    state = torch.get_rng_state()
    with Recorder(), closing(open_stream(folder, workers=2)) as stream:
        batch = stream.next()
    torch.set_num_threads(threads)
    assert_same([batch], whole[:1])
    assert stream.wait_seconds > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("batch", "size", "changes", "message"),
    [
        (16, 3, {}, "data.lanes=8 is not divisible by 3 ranks, each of which reads: use lanes and batches in m"),
        (12, 1, {}, "data.lanes=8 and train.global_batch=12 do not divide: use data.lanes=3, 4, 6 or 12"),
        (16, 1, {"lanes": 16}, "data.lanes=16 needs as many shards, data.train has 8: use data.lanes=8"),
        (16, 1, {"lanes": 0}, "data.lanes=0 must be at least 1"),
        (16, 1, {"shuffle": 0}, "data.shuffle=0 must be at least 1"),
        (16, 1, {"workers": -1}, "data.workers=-1 must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    folder: Path, batch: int, size: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Stream(config(folder, **changes), SPEC, global_batch=batch, seed=0, rank=0, size=size)


def test_a_position_of_another_order_is_refused(folder: Path) -> None:
    positions = []
    for rank in range(2):
        with closing(open_stream(folder, rank, 2)) as stream:
            stream.next()
            positions.append(stream.position())
    with pytest.raises(DataError, match=r"cannot continue with data.shuffle=9: the run began with data.shuffle=4"):
        open_stream(folder, position=merge_positions(positions), shuffle=9)
    with pytest.raises(DataError, match="the data position has no lane 1: merge"):
        open_stream(folder, position=positions[0])
    with pytest.raises(DataError, match="steps 1 and 7 do not belong together"):
        merge_positions([positions[0], positions[1] | {"step": 7}])


def test_a_damaged_position_and_one_of_an_earlier_order_are_refused(folder: Path) -> None:
    with closing(open_stream(folder)) as stream:
        position = json.loads(json.dumps(stream.position()))
    lanes = {**position["lanes"], "0": {"0": {"offset": 3, "place": 4}}}
    for change in ({"step": "1"}, {"order": []}, {"lanes": None}, {"lanes": lanes}):
        with pytest.raises(DataError, match="the data position of the checkpoint is damaged: use another checkpoint"):
            open_stream(folder, position=position | change)
    del position["order"]["version"]
    with pytest.raises(DataError, match=r"in the sample order of another w2s \(1, this one's is 2\): finish the run"):
        open_stream(folder, position=position)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_nobody_foresaw_ends_the_stream_with_a_line(folder: Path, workers: int) -> None:
    """Raised in a worker it would keep the worker, and with it this process, for ever."""
    data = DataConfig(train=str(folder), lanes=2, shuffle=4, workers=workers)
    impossible = SampleSpec(image_size=-8, grid=2)
    stream = Stream(data, impossible, global_batch=2, seed=0, rank=0, size=1)
    with pytest.raises(DataError, match="reading failed: "):
        stream.next()
    stream.close()
