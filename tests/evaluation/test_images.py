"""The images of a test set, decoded when they are asked for."""

import io
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from tests.distributed import run_ranks
from tests.evaluation.test_dataset import load, png, write_shard
from w2s.data.stream.workers import reader_pids, start_workers
from w2s.errors import DataError
from w2s.evaluation import images as module
from w2s.evaluation.images import EvalImages, View, eval_transform


def picture(size, seed=0):
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    waves = 127 + 100 * np.sin(rows / 9 + seed) * np.cos(columns / 7)
    return np.stack([rows * 2, columns, waves], -1).astype(np.uint8)


def images_of(folder, *sizes, how="crop", workers=0, group=None):
    data = load(folder)
    view = View(sizes=sizes or (16,), how=how, image_key="jpg;png")
    return EvalImages(data=data, indices=np.arange(len(data)), view=view, workers=workers, group=group)


@pytest.fixture(scope="module")
def seventy(tmp_path_factory):
    """70 images in three shards, each of another grey; more than two pieces."""
    folder = tmp_path_factory.mktemp("seventy")
    for shard, (first, last) in enumerate(pairwise([0, 40, 41, 70])):
        greys = [(f"{index:03d}", {"png": png((index,) * 3), "txt": "x"}) for index in range(first, last)]
        write_shard(folder / f"{shard}.tar", greys)
    return folder


def greys(batch):
    return batch.images[:, 0, 8, 8].tolist()


@pytest.mark.parametrize(("how", "peers"), [("crop", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("size", [(97, 150), (150, 97), (20, 31), (32, 32)])
def test_transform_is_open_clips(size, how, peers):
    photo = picture(size)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    transform = open_clip.image_transform(32, is_train=False, resize_mode=peers, interpolation="bicubic", **plain)
    reference = (255 * transform(Image.fromarray(photo))).round()
    ours = eval_transform(torch.from_numpy(photo).permute(2, 0, 1), 32, how)
    # Pillow and torch round the filter's weights in different places
    assert (ours.int() - reference.int()).abs().max() <= 2


@pytest.mark.parametrize("how", ["crop", "squash"])
def test_transform_is_torchvisions_to_the_bit(how):
    sizes = np.random.default_rng(0).integers(8, 120, size=(40, 2)).tolist()
    for height, width in [*sizes, [32, 32], [32, 50], [31, 33]]:
        pixels = torch.from_numpy(picture((height, width))).permute(2, 0, 1)
        size = [32, 32] if how == "squash" else [32]
        theirs = resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(eval_transform(pixels, 32, how), center_crop(theirs, [32, 32])), (height, width)


def test_a_picture_is_cropped_or_squashed(tmp_path):
    """A picture with a red left and a blue right quarter: a crop of its middle shows neither."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :10, 0] = pixels[:, 30:, 2] = 200
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    write_shard(tmp_path / "0.tar", [("a", {"png": stream.getvalue(), "txt": "flag"})])
    cropped, squashed = (images_of(tmp_path, 20, how=how).read()[0][0].int() for how in ("crop", "squash"))
    assert cropped.max() == 0
    assert squashed[0, :, :4].min() > 190 and squashed[2, :, -4:].min() > 190 and squashed[:, :, 7:13].max() < 10


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_any_places_in_order(seventy, workers):
    images = images_of(seventy, 16, 24, workers=workers)
    ranges = [range(0, 50), range(60, 70), range(39, 42)]
    batches = list(images.batches(ranges))
    assert [greys(batch) for batch in batches] == [list(each) for each in ranges]
    assert [batch.indices.tolist() for batch in batches] == [list(each) for each in ranges]
    assert [view.shape for view in batches[1].views] == [(10, 3, 16, 16), (10, 3, 24, 24)]
    assert batches[0].images.dtype == torch.uint8


def test_some_images_in_an_order_of_their_own(seventy):
    some = images_of(seventy).only(np.array([69, 3, 4, 5, 40]))
    assert some.read()[0][:, 0, 8, 8].tolist() == [69, 3, 4, 5, 40]
    assert [greys(batch) for batch in some.batches([range(1, 4)])] == [[3, 4, 5]]


def test_neighbours_in_a_shard_are_read_in_one_go(seventy, monkeypatch):
    opened = []
    read = module.read_shard
    monkeypatch.setattr(module, "read_shard", lambda *place: opened.append(place[:2]) or read(*place))
    images_of(seventy).only(np.array([1, 2, 3, 40, 41, 42, 44])).read()
    assert [Path(shard).name for shard, _ in opened] == ["0.tar", "1.tar", "2.tar", "2.tar"]


def decoded_together(folder):
    images, counts = images_of(folder, group=dist.group.WORLD), []
    decode = View.decode
    View.decode = lambda self, shards, places: counts.append(len(places)) or decode(self, shards, places)
    batches = list(images.batches([range(0, 33), range(33, 38)]))
    return [greys(batch) for batch in batches], sum(counts)


def test_ranks_that_need_the_same_batches_decode_a_share_each(seventy):
    for seen, decoded in run_ranks(decoded_together, 2, seventy):
        assert seen == [list(range(0, 33)), list(range(33, 38))]
        assert decoded == 17 + 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"png": b"nothing", "txt": "x"}, "0.tar: a: image cannot be decoded, repair the test set"),
        ({"gif": png(), "txt": "x"}, "0.tar: a: no image .jpg;png, set data.image_key or repair the test set"),
    ],
)
def test_a_bad_image_is_one_line(tmp_path, files, message, workers):
    write_shard(tmp_path / "0.tar", [("a", files)])
    with pytest.raises(DataError) as error:
        list(images_of(tmp_path, workers=workers).batches([range(1)]))
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


def test_a_killed_reading_process_is_started_again(seventy, monkeypatch):
    started = []

    def start(dataset, workers):
        parts = start_workers(dataset, workers)
        started.append(parts)
        return parts

    monkeypatch.setattr(module, "start_workers", start)
    batches = images_of(seventy, workers=1).batches([range(n, n + 1) for n in range(70)])
    assert greys(next(batches)) == [0]
    os.kill(reader_pids(started[0])[0], signal.SIGKILL)
    assert [greys(batch) for batch in batches] == [[index] for index in range(1, 70)]
    assert len(started) <= 2  # the last images may have been on their way already
