"""Making shards of images with captions and classes: `w2s data make`."""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from w2s.data.making.class_names import named_classes
from w2s.data.making.clip_benchmark import BenchmarkSet, describe, natural
from w2s.data.making.items import Item, read_images
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.shards.listing import is_parquet
from w2s.errors import DataError

logger = logging.getLogger(__name__)

_PLAN = "make.json"
_TOGETHER = 64
"""Shards that are written in one pass over parquet files."""

Job = tuple[Path, list[tuple[int, Item]]]
"""A shard, and the items in it with their indices."""
Beside = Callable[[Item], dict[str, bytes]]
"""Gives the files of an item beside its image, by extension."""


def make_shards(
    items: Sequence[Item],
    out: Path,
    *,
    shard_size: int,
    seed: int,
    workers: int,
    test_set: BenchmarkSet | None = None,
    class_names: Path | None = None,
) -> dict[str, int]:
    """Write images into shards, shuffled; what an interrupted call has written is kept.

    A sample has the image's (or the video's) file as it is, `KEY.txt` if it has a caption, `KEY.json` with `captions`
    if it has several, and `KEY.cls`, the number of its class in `classnames.txt`. Where an image has several classes,
    `KEY.npy` has a 1 or a 0 for each class.

    Args:
        items: what is written.
        out: folder for the shards.
        shard_size: samples of a shard.
        seed: of the shuffling. Equal input and seed give equal bytes.
        workers: threads that write.
        test_set: write them in the layout of CLIP_benchmark's test sets. Items of the same image are one sample then,
            with all their captions, a line each, and classes.
        class_names: file that names the classes, see `named_classes`.

    Returns:
        Number of samples by the shard's name, as in `sizes.json`.

    Raises:
        DataError: an image is missing, `out` has shards of another input, or a class has no name.
    """
    items = _joined(items) if test_set else list(items)
    folder, file = (out / test_set.split, "{}.tar") if test_set else (out, "{:06d}.tar")
    numbers, names = _number_classes(items, test_set, class_names)
    prompts = test_set.find_prompts() if test_set else []
    order = generator(seed, Purpose.SHARDS, 0).permutation(len(items))
    several = _several(items)

    def beside(item: Item) -> dict[str, bytes]:
        classes = [numbers[label] for label in item.classes]
        marks = {"npy": _marks(classes, len(names))} if several else {"cls": b"%d" % classes[0]} if classes else {}
        return _texts(item.captions, lines=test_set is not None) | marks

    parts = [
        [(int(n), items[n]) for n in order[first : first + shard_size]] for first in range(0, len(items), shard_size)
    ]
    try:
        _begin(folder, items, numbers, {"shard_size": shard_size, "seed": seed})
        jobs = [(folder / file.format(shard), part) for shard, part in enumerate(parts)]
        _write_all(jobs, beside, workers)
        if test_set:
            describe(out, test_set.split, shards=len(parts), names=names, prompts=prompts, kind=_kind(items))
        elif names:
            (out / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        sizes = {path.name: len(part) for path, part in jobs}
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot make shards in {out}: {error}") from error
    if not test_set and any(len(item.captions) > 1 for item in items):
        logger.info("images have several captions: data.caption_key=json.captions draws one, txt is the first")
    return sizes


def _number_classes(
    items: Sequence[Item], test_set: BenchmarkSet | None, class_names: Path | None
) -> tuple[Mapping[str, int], Sequence[str]]:
    """The number of each class by what the source calls it, and the names by number."""
    labels = sorted({name for item in items for name in item.classes}, key=natural if test_set else None)
    if class_names is not None:
        return named_classes(labels, class_names)
    names = test_set.class_names(labels) if test_set else labels
    return {label: number for number, label in enumerate(labels)}, names


def _begin(out: Path, items: Sequence[Item], numbers: Mapping[str, int], options: dict[str, int]) -> None:
    """Note what is made, or find that it is the same as what an earlier call began."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr(sorted(numbers.items())).encode())
    for item in items:
        digest.update(repr((item.image.name, item.image.stat().st_size, item.captions, item.classes)).encode())
    plan = json.dumps({"samples": len(items), "digest": digest.hexdigest()[:16], **options}, indent=1) + "\n"
    file = out / _PLAN
    if file.is_file() and file.read_text(encoding="utf-8") != plan:
        raise DataError(f"{out} has shards of another input, size or seed: choose another folder, or empty it")
    file.write_text(plan, encoding="utf-8")


def _write_all(jobs: list[Job], beside: Beside, workers: int) -> None:
    missing = [job for job in jobs if not job[0].is_file()]
    (_, first_item), *_ = jobs[0][1]
    together = _TOGETHER if is_parquet(str(first_item.image)) else 1
    groups = [missing[first : first + together] for first in range(0, len(missing), together)]
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda group: _write(group, beside), groups):
            pass


def _write(jobs: list[Job], beside: Beside) -> None:
    """Write some shards at once; the rows of parquet files come in their order."""
    with ExitStack() as stack:
        entries = [(item, index, shard) for shard, (_, part) in enumerate(jobs) for index, item in part]
        entries.sort(key=lambda entry: (str(entry[0].image) if entry[0].column else "", entry[0].row))
        writers = [
            stack.enter_context(TarWriter(str(path.with_suffix(".part")), encoder=False, mtime=0)) for path, _ in jobs
        ]
        images = read_images([item for item, *_ in entries])
        for (item, index, shard), files in zip(entries, images, strict=True):
            writers[shard].write({"__key__": f"{index:09d}", **files, **beside(item)})
    for path, _ in jobs:
        path.with_suffix(".part").rename(path)


def _texts(captions: Sequence[str], lines: bool) -> dict[str, bytes]:
    """Captions by extension: as lines of a text, or else the first one as a text and all of several as JSON."""
    if not captions:
        return {}
    if lines or len(captions) == 1:
        return {"txt": "\n".join(captions).encode()}
    return {"txt": captions[0].encode(), "json": json.dumps({"captions": captions}, ensure_ascii=False).encode()}


def _marks(numbers: list[int], classes: int) -> bytes:
    """A NumPy file with a 1 for each of an image's classes and a 0 for each other: int64 [classes]."""
    marks = np.zeros(classes, dtype=np.int64)
    marks[numbers] = 1
    stream = io.BytesIO()
    np.save(stream, marks)
    return stream.getvalue()


def _joined(items: Sequence[Item]) -> list[Item]:
    """Items of different images, each with all captions and classes that its image has."""
    by_image: dict[tuple[Path, int], list[Item]] = {}
    for item in items:
        by_image.setdefault((item.image, item.row), []).append(item)
    return [
        replace(same[0], captions=_lines(item.captions for item in same), classes=_lines(item.classes for item in same))
        for same in by_image.values()
    ]


def _lines(values: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Different lines of texts, in order."""
    lines = (line.strip() for several in values for text in several for line in text.splitlines())
    return tuple(dict.fromkeys(filter(None, lines)))


def _kind(items: Sequence[Item]) -> str:
    """What CLIP_benchmark calls a set of several classes or of captions alone; one class per image has no name."""
    if _several(items):
        return "multilabel"
    return "retrieval" if any(item.captions for item in items) and not any(item.classes for item in items) else ""


def _several(items: Sequence[Item]) -> bool:
    """Whether an image has several classes."""
    return any(len(item.classes) > 1 for item in items)
