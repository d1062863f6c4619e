"""The loader beside open_clip's own: images per second of a core on the same shards, and how far the tensors differ."""

import io
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from rich.console import Console
from webdataset.tariterators import tar_file_expander

from w2s.bench.loaders.photographs import SHARDS, cut_shards
from w2s.config.sections import DataConfig, TeacherConfig
from w2s.data.samples.batch import Batch, normalize
from w2s.data.samples.decode import open_image
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.samples.sample import SampleSpec, crop_box, make_sample
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.data.shards.raw_sample import RawSample
from w2s.data.stream.stream import Stream
from w2s.errors import MissingPackageError
from w2s.teachers.build import build_teacher
from w2s.towers.vision import MEAN, STD
from w2s.tracking.tables import Table

BATCH = 32
SIZE = 224
SEED = 0

Box = tuple[int, int, int, int]
Boxes = dict[tuple[int, int], Box]
"""Crop by the width and height of an image."""


@dataclass(frozen=True)
class Shards:
    """The shards of one image size."""

    name: str
    pattern: str
    samples: int


def measure(photographs: Path, *, samples: int, repeats: int, workers: int) -> dict[str, Any]:
    """Measure both loaders in turns at two image sizes.

    Both read the same images from the same shards, with the same crop of each image, the same tokenizer and as many
    processes; an image per CPU second counts the time of all processes of a loader.

    Args:
        photographs: folder of photographs.
        samples: images of about 500 x 400 pixels; a quarter as many of about 1600 x 1200.
        repeats: measurements of each loader, of which the median is taken.
        workers: reading processes.

    Returns:
        Figures by image size and loader.

    Raises:
        MissingPackageError: open_clip's training code is not installed.
        DataError: there are no photographs that are large enough.
    """
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"workers": workers, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        # All of them first: photographs that are too small are refused before anything is measured.
        sets = []
        for name, width, height, count in (("500x400", 500, 400, samples), ("1600x1200", 1600, 1200, samples // 4)):
            # Whole batches for each process, so that both loaders read every image once.
            count = max(2, round(count / (BATCH * SHARDS))) * BATCH * SHARDS
            sets.append(Shards(name, cut_shards(photographs, Path(folder) / name, width, height, count), count))
        for shards in sets:
            figures[shards.name] = _compare(shards, repeats, workers)
    return figures


def spec(scale: tuple[float, float]) -> SampleSpec:
    """Return what open_clip's loader gives too: an image and the tokens of its caption."""
    return SampleSpec(
        image_size=SIZE,
        grid=16,
        context_length=77,
        crop_scale=scale,
        flip=False,
    )


def _compare(shards: Shards, repeats: int, workers: int) -> dict[str, Any]:
    wanted = spec((0.9, 1.0))
    boxes = _boxes(shards, wanted)
    loaders: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        "open_clip": lambda: open_clip_images(shards, boxes, workers),
        "w2s": lambda: _ours(shards, wanted, workers),
        "w2s, half scale": lambda: _ours(shards, replace(wanted, half_scale=True), workers),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(repeats):
        for name, load in loaders.items():
            speeds[name].append(_speed(load, shards.samples // BATCH))
    figures: dict[str, Any] = {
        name: dict(zip(("per_cpu_second", "per_second"), map(statistics.median, zip(*pairs, strict=True)), strict=True))
        for name, pairs in speeds.items()
    }
    for name, pairs in speeds.items():
        ratios = [ours / peer for (ours, _), (peer, _) in zip(pairs, speeds["open_clip"], strict=True)]
        figures[name]["ratio"] = statistics.median(ratios)
        figures[name]["ratios"] = [round(ratio, 3) for ratio in ratios]
    figures["w2s"]["difference_0.9-1"] = _difference(shards, wanted)
    figures["w2s"]["difference_0.2-1"] = _difference(shards, spec((0.2, 1.0)))
    figures["w2s, half scale"]["difference_0.9-1"] = _difference(shards, replace(wanted, half_scale=True))
    figures["w2s, half scale"]["teacher_cosine"] = _teacher_cosine(shards, wanted)
    return figures


def _speed(load: Callable[[], Iterator[torch.Tensor]], count: int) -> tuple[float, float]:
    """Images per CPU second of all processes and per second, from the first of `count` batches to the last."""
    batches = load()
    next(batches)
    wall, busy = time.perf_counter(), _busy_seconds()
    images = sum(len(batch) for batch in islice(batches, count - 1))
    # Before the processes end, and with them their times.
    busy, wall = _busy_seconds() - busy, time.perf_counter() - wall
    for _ in batches:
        raise RuntimeError("a loader gave more batches than there are images")
    return images / busy, images / wall


def _busy_seconds() -> float:
    loader = psutil.Process()
    times = [process.cpu_times() for process in [loader, *loader.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def _samples(shards: Shards) -> Iterator[tuple[int, RawSample]]:
    samples = (sample for shard in list_shards(shards.pattern) for sample in read_shard(shard))
    return enumerate(samples)


def _ours(shards: Shards, wanted: SampleSpec, workers: int) -> Iterator[torch.Tensor]:
    # Short windows: what is read ahead beyond the last batch would be counted, and used by nobody.
    return our_images(shards, wanted, lanes=SHARDS, shuffle=16, workers=workers)


def our_images(shards: Shards, wanted: SampleSpec, *, lanes: int, shuffle: int, workers: int) -> Iterator[torch.Tensor]:
    """Yield the normalised images of our loader, each of the shards' once."""
    for batch in _our_batches(shards, wanted, lanes, shuffle, workers):
        yield normalize(batch.images, MEAN, STD)


def _our_batches(shards: Shards, wanted: SampleSpec, lanes: int, shuffle: int, workers: int) -> Iterator[Batch]:
    data = DataConfig(train=shards.pattern, lanes=lanes, shuffle=shuffle, workers=workers, max_bad_fraction=0.0)
    with closing(Stream(data, wanted, global_batch=BATCH, seed=SEED, rank=0, size=1)) as stream:
        for _ in range(shards.samples // BATCH):
            yield stream.next()


def _boxes(shards: Shards, wanted: SampleSpec) -> Boxes:
    """The crop that our stream gives each image, which is known by its size."""
    sizes = {sample.key: open_image(io.BytesIO(sample.files["jpg"])).size for _, sample in _samples(shards)}
    boxes = {}
    for batch in _our_batches(shards, replace(wanted, image_size=8), SHARDS, shuffle=16, workers=0):
        for key, index in zip(batch.keys, batch.indices.tolist(), strict=True):
            boxes[sizes[key]] = _box(sizes[key], wanted, index)
    return boxes


def _box(size: tuple[int, int], wanted: SampleSpec, index: int) -> Box:
    rng = generator(SEED, Purpose.CROP, index)
    return crop_box(rng, size[1], size[0], wanted.crop_scale, wanted.crop_ratio)


def open_clip_images(shards: Shards, boxes: Boxes | None, workers: int) -> Iterator[torch.Tensor]:
    """Yield the images of open_clip's pipeline, as its trainer gets them.

    Args:
        shards: the shards.
        boxes: crop by the width and height of an image; None crops at random.
        workers: reading processes.

    Raises:
        MissingPackageError: open_clip's training code is not installed.
    """
    try:
        from open_clip import SimpleTokenizer
        from open_clip_train import data as peer
    except ImportError as error:
        raise MissingPackageError(
            f"w2s bench data needs open_clip's training code ({error}): pip install open_clip_torch pandas"
        ) from error
    args = Namespace(
        train_data=shards.pattern,
        train_num_samples=shards.samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        world_size=1,
        workers=workers,
        seed=SEED,
    )
    # Newer releases of webdataset than it was written for add a mark at the end of every shard.
    if "eof_value" in signature(tar_file_expander).parameters:
        peer.tar_file_expander = partial(tar_file_expander, eof_value=None)
    info = peer.get_wds_dataset(args, peer_transform(boxes), is_train=True, tokenizer=SimpleTokenizer())
    for images, _ in info.dataloader:
        yield images


def peer_transform(boxes: Boxes | None) -> Callable[[Image.Image], torch.Tensor]:
    """Return open_clip's training transform, with given crops in the place of random ones if there are some."""
    from open_clip.transform import AugmentationCfg, image_transform

    transform = image_transform(SIZE, is_train=True, mean=MEAN, std=STD, aug_cfg=AugmentationCfg(scale=(0.9, 1.0)))
    if boxes is not None:
        transform.transforms[0].get_params = lambda image, scale, ratio: boxes[image.size]
    return transform


def _difference(shards: Shards, wanted: SampleSpec) -> float:
    """The largest difference of the normalised tensors, in steps of 1/255 of the pixels' range."""
    std = torch.tensor(STD).view(3, 1, 1)
    largest = 0.0
    for index, sample in _samples(shards):
        image = open_image(io.BytesIO(sample.files["jpg"]))
        theirs = peer_transform({image.size: _box(image.size, wanted, index)})(image.convert("RGB"))
        ours = normalize(make_sample(sample, wanted, SEED, index).images, MEAN, STD)[0]
        largest = max(largest, ((ours - theirs) * std).abs().max().item() * 255)
    return largest


def _teacher_cosine(shards: Shards, wanted: SampleSpec) -> dict[str, float] | str:
    """How far decoding at half scale moves a teacher's patch features."""
    try:
        teacher = build_teacher(TeacherConfig(source="efficientnet_lite0"), grid=7, device="cpu")
    except MissingPackageError as error:
        return str(error)
    cosines = []
    for index, sample in _samples(shards):
        views = [make_sample(sample, replace(wanted, half_scale=half), SEED, index).images[0] for half in (False, True)]
        with torch.no_grad():
            whole, half = teacher(normalize(torch.stack(views), teacher.mean, teacher.std)).patches
        # A patch without any feature has no direction.
        cosines.append(torch.cosine_similarity(whole, half, dim=-1)[whole.norm(dim=-1) > 0])
    joined = torch.cat(cosines)
    return {"mean": joined.mean().item(), "least": joined.min().item()}


def print_table(figures: dict[str, Any]) -> None:
    """Print a table for each image size."""
    console = Console(highlight=False)
    for size in ("500x400", "1600x1200"):
        rows = []
        for name in ("open_clip", "w2s", "w2s, half scale"):
            row = figures[size][name]
            differences = [f"{row[key]:.2f}" if key in row else "" for key in ("difference_0.9-1", "difference_0.2-1")]
            speeds = [f"{row[key]:.0f}" for key in ("per_cpu_second", "per_second")]
            rows.append([name, *speeds, f"{row['ratio']:.2f}", *differences])
        title = f"about {size}, {figures['workers']} workers each, median of {figures['repeats']}"
        columns = ("loader", "images / CPU s", "images / s", "ratio", "difference 0.9-1", "0.2-1")
        console.print(Table(title, columns, rows).to_rich())
        cosine = figures[size]["w2s, half scale"]["teacher_cosine"]
        console.print(f"teacher's features at half scale, cosine: {cosine}")
