"""Making shards of a folder of images or of a table: `w2s data make`."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from w2s.data.benchmark import BenchmarkSet, describe, natural
from w2s.data.counter import Purpose, generator
from w2s.errors import DataError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

_IMAGE_COLUMNS = ("image", "path", "filepath", "file")
_CAPTION_COLUMNS = ("caption", "title", "text")
_CLASS_COLUMNS = ("class", "label")
_PLAN = "make.json"


@dataclass(frozen=True)
class Item:
    """One image with what belongs to it."""

    image: Path
    caption: str | None
    """Several are on lines of their own."""
    label: str | None
    """Name of its class; several are on lines of their own."""

    @property
    def classes(self) -> list[str]:
        """Names of its classes."""
        return [] if self.label is None else self.label.split("\n")


def make_shards(
    source: Path, out: Path, *, shard_size: int, seed: int, workers: int, test_set: BenchmarkSet | None = None
) -> dict[str, int]:
    """Write the images of a folder or a table into shards, shuffled; what an interrupted call has written is kept.

    A sample has the image's file as it is, `KEY.txt` if it has a caption and `KEY.cls` (the number of its name in
    `classnames.txt`) if it has a class. In a folder the caption is the text file beside the image, the class the folder
    below `source` where all images lie in one. A table (`.csv`, or `.tsv`) has a column `image` (or path, filepath,
    file; relative to the table), and may have `caption` (or title, text) and `class` (or label).

    Args:
        source: the folder or the table.
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
    items = read_table(source) if source.suffix in (".csv", ".tsv") else read_folder(source)
    if not items:
        raise DataError(f"{source} has no images: there are none that end in .{', .'.join(EXTENSIONS)}")
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
        jobs = [(folder / file.format(number), part, classes, kind) for number, part in enumerate(parts)]
        _write_all(jobs, workers)
        if test_set:
            describe(out, test_set.split, shards=len(parts), names=names, prompts=prompts, kind=kind)
        elif classes:
            (out / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        sizes = {file.format(number): len(part) for number, part in enumerate(parts)}
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot make shards in {out}: {error}") from error
    return sizes


def read_folder(folder: Path) -> list[Item]:
    """Find the images below a folder, in the order of their paths."""
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder nor a .csv or .tsv file")
    images = [path for path in sorted(folder.rglob("*")) if path.suffix[1:].lower() in EXTENSIONS]
    classes = [path.relative_to(folder).parts[0] for path in images]
    labelled = all(len(path.relative_to(folder).parts) > 1 for path in images)
    return [
        Item(path, _text_beside(path), name if labelled else None) for path, name in zip(images, classes, strict=True)
    ]


def _text_beside(image: Path) -> str | None:
    text = image.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").strip() if text.is_file() else None
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is not UTF-8 text: repair it") from error


def read_table(path: Path) -> list[Item]:
    """Read a table of images, in its order."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin their files with a mark
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    columns = list(rows[0]) if rows else []
    image, caption, label = (_column(columns, names) for names in (_IMAGE_COLUMNS, _CAPTION_COLUMNS, _CLASS_COLUMNS))
    if rows and image is None:
        raise DataError(f"{path} has the columns {', '.join(columns)}: name the one with the files `image`")
    items = [
        # A row that ends early has None in its last columns.
        Item(path.parent / (row[image or ""] or ""), row[caption] if caption else None, row[label] if label else None)
        for row in rows
    ]
    missing = [item.image for item in items if not item.image.is_file()]
    if missing:
        raise DataError(f"{path}: {len(missing)} of {len(items)} images are missing, the first is {missing[0]}")
    return items


def _column(columns: list[str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns), None)


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


Job = tuple[Path, list[tuple[int, Item]], list[str], str]


def _write_all(jobs: list[Job], workers: int) -> None:
    missing = [job for job in jobs if not job[0].is_file()]
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(_write, missing):
            pass


def _write(job: Job) -> None:
    path, part, classes, kind = job
    numbers = {name: number for number, name in enumerate(classes)}
    unfinished = path.with_suffix(".part")
    with TarWriter(str(unfinished), encoder=False, mtime=0) as writer:
        for number, item in part:
            image = {item.image.suffix[1:].lower(): item.image.read_bytes()}
            writer.write({"__key__": f"{number:09d}", **image, **_beside(item, numbers, kind)})
    unfinished.rename(path)


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
    by_image: dict[Path, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    return [
        Item(image, _lines(item.caption for item in same), _lines(item.label for item in same))
        for image, same in by_image.items()
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
