"""Making shards of a folder of images, a table or a parquet file: `w2s data make`."""

import hashlib
import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from w2s.data.benchmark import BenchmarkSet, describe, natural
from w2s.data.counter import Purpose, generator
from w2s.data.items import Item, find_items, read_images
from w2s.data.shards import is_parquet
from w2s.errors import DataError

_PLAN = "make.json"
_TOGETHER = 64
"""Shards that are written in one pass over a parquet file."""

Job = tuple[Path, list[tuple[int, Item]]]
"""A shard, and the items in it with their numbers."""


def make_shards(
    source: Path, out: Path, *, shard_size: int, seed: int, workers: int, test_set: BenchmarkSet | None = None
) -> dict[str, int]:
    """Write the images that `source` has into shards, shuffled; what an interrupted call has written is kept.

    A sample has the image's (or the video's) file as it is, `KEY.txt` if it has a caption and `KEY.cls` (the number of
    its name in `classnames.txt`) if it has a class. In a folder the caption is the text file beside the image, the
    class the folder below `source` where all images lie in one; `metadata.csv` or `metadata.jsonl` in it is a table. A
    table (`.csv`, `.tsv` or `.jsonl`) has a column `image` (or file_name, path, filepath, file; relative to the table),
    and may have `caption` (or title, text) and `class` (or label). A parquet file has the images in a column.

    Args:
        source: the folder, the table or the parquet file.
        out: folder for the shards.
        shard_size: samples of a shard.
        seed: of the shuffling. Equal input and seed give equal bytes.
        workers: threads that write.
        test_set: write them in the layout of CLIP_benchmark's test sets. Rows of a table that name the same image are
            one sample then, with all their captions and classes; several classes of an image are `KEY.npy`, a 1 or a 0
            for each class.

    Returns:
        Number of samples by the shard's name, as in `sizes.json`.

    Raises:
        DataError: the input has no images, an image is missing, or `out` has shards of another input.
    """
    items = find_items(source)
    items = _joined(items) if test_set else items
    classes = sorted({name for item in items for name in item.classes}, key=natural if test_set else None)
    folder, file = (out / test_set.split, "{}.tar") if test_set else (out, "{:06d}.tar")
    names = test_set.class_names(classes) if test_set else classes
    prompts = test_set.find_prompts() if test_set else []
    order = generator(seed, Purpose.SHARDS, 0).permutation(len(items))
    parts = [
        [(int(n), items[n]) for n in order[first : first + shard_size]] for first in range(0, len(items), shard_size)
    ]
    try:
        _begin(folder, items, {"shard_size": shard_size, "seed": seed})
        kind = _kind(items) if test_set else ""
        jobs = [(folder / file.format(number), part) for number, part in enumerate(parts)]
        _write_all(jobs, classes, kind, workers)
        if test_set:
            describe(out, test_set.split, shards=len(parts), names=names, prompts=prompts, kind=kind)
        elif classes:
            (out / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        sizes = {file.format(number): len(part) for number, part in enumerate(parts)}
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot make shards in {out}: {error}") from error
    return sizes


def _begin(out: Path, items: list[Item], options: dict[str, int]) -> None:
    """Note what is made, or find that it is the same as what an earlier call began."""
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.image.name, item.image.stat().st_size, item.caption, item.label)).encode())
    plan = json.dumps({"samples": len(items), "digest": digest.hexdigest()[:16], **options}, indent=1) + "\n"
    file = out / _PLAN
    if file.is_file() and file.read_text(encoding="utf-8") != plan:
        raise DataError(f"{out} has shards of another input, size or seed: choose another folder, or empty it")
    file.write_text(plan, encoding="utf-8")


def _write_all(jobs: list[Job], classes: list[str], kind: str, workers: int) -> None:
    missing = [job for job in jobs if not job[0].is_file()]
    (_, first_item), *_ = jobs[0][1]
    together = _TOGETHER if is_parquet(str(first_item.image)) else 1
    groups = [missing[first : first + together] for first in range(0, len(missing), together)]
    numbers = {name: number for number, name in enumerate(classes)}
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda group: _write(group, numbers, kind), groups):
            pass


def _write(jobs: list[Job], classes: dict[str, int], kind: str) -> None:
    """Write some shards at once; the rows of a parquet file come in their order."""
    with ExitStack() as stack:
        entries = [(item, number, shard) for shard, (_, part) in enumerate(jobs) for number, item in part]
        entries.sort(key=lambda entry: entry[0].row)
        writers = [
            stack.enter_context(TarWriter(str(path.with_suffix(".part")), encoder=False, mtime=0)) for path, _ in jobs
        ]
        images = read_images([item for item, *_ in entries])
        for (item, number, shard), files in zip(entries, images, strict=True):
            writers[shard].write({"__key__": f"{number:09d}", **files, **_beside(item, classes, kind)})
    for path, _ in jobs:
        path.with_suffix(".part").rename(path)


def _beside(item: Item, numbers: dict[str, int], kind: str) -> dict[str, bytes]:
    """The caption and the classes of an item, if it has them, by extension."""
    files = {} if item.caption is None else {"txt": item.caption.encode()}
    own = [numbers[name] for name in item.classes]
    if kind == "multilabel":
        return files | {"npy": _marks(own, len(numbers))}
    return files | ({"cls": b"%d" % own[0]} if own else {})


def _marks(numbers: list[int], classes: int) -> bytes:
    """A NumPy file with a 1 for each of an image's classes and a 0 for each other: int64 [classes]."""
    marks = np.zeros(classes, dtype=np.int64)
    marks[numbers] = 1
    stream = io.BytesIO()
    np.save(stream, marks)
    return stream.getvalue()


def _joined(items: list[Item]) -> list[Item]:
    """Items of different images, each with all captions and classes that its image has."""
    by_image: dict[tuple[Path, int], list[Item]] = {}
    for item in items:
        by_image.setdefault((item.image, item.row), []).append(item)
    return [
        Item(image, _lines(item.caption for item in same), _lines(item.label for item in same), row)
        for (image, row), same in by_image.items()
    ]


def _lines(values: Iterable[str | None]) -> str | None:
    """Different texts, a line each; None where there is none."""
    lines = dict.fromkeys(line.strip() for value in values if value is not None for line in value.splitlines())
    return "\n".join(line for line in lines if line) or None


def _kind(items: list[Item]) -> str:
    """What CLIP_benchmark calls a set of several classes or of captions alone; one class an image has no name."""
    if any(len(item.classes) > 1 for item in items):
        return "multilabel"
    return "retrieval" if any(item.caption for item in items) and not any(item.classes for item in items) else ""
