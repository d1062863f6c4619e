"""What `w2s data make` makes shards of: images in folders, named by tables, or inside of parquet files."""

import glob
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from w2s.data.making.table_files import (
    CAPTION_COLUMNS,
    CLASS_COLUMNS,
    IMAGE_COLUMNS,
    SUFFIXES,
    Columns,
    Record,
    choose,
    image_folder,
    read_table,
    texts,
)
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import is_parquet
from w2s.data.shards.raw_sample import extension_of, kind
from w2s.errors import DataError

logger = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi")

_METADATA = ("metadata.csv", "metadata.jsonl")
"""Tables that name the images of a folder, by the rules of Hugging Face's `datasets`."""
_SPLITS = {"train", "val", "valid", "validation", "dev", "test"}
_PART = re.compile(r"(.+)-\d+-of-\d+\.parquet")
"""A parquet file of a split, as `datasets` names it."""


@dataclass(frozen=True)
class Item:
    """One image, clip or video with what belongs to it."""

    image: Path
    """Its file, or the parquet file that has it."""
    captions: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    """Names of its classes."""
    row: int = 0
    """Its row in a parquet file."""
    column: str = ""
    """Its column there."""


def find_items(source: Path, columns: Columns | None = None, images: Path | None = None) -> list[Item]:
    """Find the images of a folder, a table or parquet files, in their order.

    In a folder the caption of an image is the text file beside it, its class the folder below `source` where all images
    lie in one; `metadata.csv` or `metadata.jsonl` in it is a table. A table (`.csv`, `.tsv`, `.jsonl`, or a list in
    `.json`) has a column of paths (`image`, `file_name`, ...), and may have captions and classes; a list in a cell is
    several. A COCO caption file has all captions of an image. Parquet files (one, a folder, a glob) have images in a
    column, or paths.

    Args:
        source: the folder, the table, the parquet file or a glob of these.
        columns: which columns have what; None takes the usual ones.
        images: folder that a table's paths are relative to; None is the table's own, or COCO's.

    Raises:
        DataError: there is none, or one is missing.
    """
    columns = columns or Columns()
    if is_parquet(str(source)):
        items = _of_parquet_files(source, columns, images)
    elif source.suffix in SUFFIXES:
        items = _of_records(source, read_table(source), columns, images)
    else:
        if images is not None:
            raise DataError(f"--images is for the paths of a table, and {source} is a folder: leave it out")
        items = _of_folder(source, columns)
    if not items:
        raise DataError(f"{source} has no images: no file ends in .{', .'.join((*IMAGES, *VIDEOS))}")
    return items


def read_images(items: Sequence[Item]) -> Iterator[dict[str, bytes]]:
    """Read the image of each item, or the images of its clip, by extension.

    Args:
        items: files in any order; rows of a parquet file stand together, in theirs.
    """
    for path, same in groupby(items, lambda item: item.image):
        if is_parquet(str(path)):
            yield from _read_rows(path, list(same))
        else:
            yield from ({path.suffix[1:].lower(): path.read_bytes()} for _ in same)


def _read_rows(path: Path, items: Sequence[Item]) -> Iterator[dict[str, bytes]]:
    rows = {item.row for item in items}
    samples = read_shard(str(path), min(rows), {items[0].column})
    for row, sample in zip(range(min(rows), max(rows) + 1), samples, strict=False):
        if sample.damage or (row in rows and not sample.files):
            raise DataError(f"{path}: {sample.key}: {sample.damage or 'image is missing'}, repair the file")
        if row in rows:
            yield {name.removesuffix(kind(name)) + extension_of(data): data for name, data in sample.files.items()}


def _of_folder(folder: Path, columns: Columns) -> list[Item]:
    """Those below a folder, in the order of their paths, or those that the folder's metadata or parquet files name."""
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder nor a {', '.join(SUFFIXES)} or .parquet file")
    tables = sorted(path for path in folder.rglob("metadata.*") if path.name in _METADATA)
    if tables and tables[0].parent == folder:
        return _of_records(tables[0], read_table(tables[0]), columns, None)
    if tables:
        raise DataError(f"{folder} has no {' or '.join(_METADATA)}, but {tables[0].parent} has: name that folder")
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix[1:].lower() in (*IMAGES, *VIDEOS)]
    if not paths and any(folder.glob("*.parquet")):
        return _of_parquet_files(Path(glob.escape(str(folder))) / "*.parquet", columns, None)
    if columns != Columns():
        raise DataError(f"{folder} has no {' or '.join(_METADATA)}, so there are no columns to name: leave them out")
    parts = [path.relative_to(folder).parts for path in paths]
    labelled = all(len(each) > 1 for each in parts)
    labels = {each[0] for each in parts} if labelled else set()
    if labels and labels <= _SPLITS:
        raise DataError(f"{folder} has the splits {', '.join(sorted(labels))}: name one of them")
    return [
        Item(path, _text_beside(path), each[:1] if labelled else ()) for path, each in zip(paths, parts, strict=True)
    ]


def _text_beside(image: Path) -> tuple[str, ...]:
    text = image.with_suffix(".txt")
    try:
        words = text.read_text(encoding="utf-8").strip() if text.is_file() else ""
        return (words,) if words else ()
    except UnicodeDecodeError as error:
        raise DataError(f"{text} is not UTF-8 text: repair it") from error


def _of_records(path: Path, records: Sequence[Record], columns: Columns, images: Path | None) -> list[Item]:
    """Those that a table names, in its order."""
    there = list(records[0]) if records else []
    if not records:
        return []
    image = choose(there, columns.image, IMAGE_COLUMNS, path)
    caption, label = _beside(path, there, columns)
    if image is None:
        raise DataError(
            f"{path} has the columns {', '.join(there)}: name the one of the images with --image-column{_links(there)}"
        )
    # A record that ends early has None in its last columns.
    folder = images or image_folder(path, str(records[0].get(image)))
    items = [
        Item(folder / str(record.get(image) or ""), texts(record, caption), texts(record, label)) for record in records
    ]
    missing = [item.image for item in items if not item.image.is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(items)} images are missing, the first is {missing[0]}: name their folder "
            "with --images"
        )
    return items


def _beside(path: Path, there: Sequence[str], columns: Columns) -> tuple[str | None, str | None]:
    """The columns of captions and of classes."""
    caption = choose(there, columns.caption, CAPTION_COLUMNS, path)
    label = choose(there, columns.label, CLASS_COLUMNS, path)
    if caption is label is None:
        logger.info(
            "%s has no captions or classes that are known by their name, only the columns %s: name one with "
            "--caption-column or --class-column if it has some", path, ", ".join(there)
        )  # fmt: skip
    return caption, label


def _links(columns: Sequence[str]) -> str:
    if not {"url", "image_url"} & {column.lower() for column in columns}:
        return ""
    return ", or fetch what its URLs name with img2dataset, whose shards are read as they are"


def _of_parquet_files(source: Path, columns: Columns, images: Path | None) -> list[Item]:
    if not glob.has_magic(str(source)):
        return _of_parquet(source, columns, images)
    files = sorted(map(Path, glob.glob(str(source))))
    splits = sorted({part[1] for path in files if (part := _PART.fullmatch(path.name))})
    if len(splits) > 1:
        raise DataError(f"{source} has the splits {', '.join(splits)}: name one, such as {splits[0]}-*.parquet")
    return [item for path in files for item in _of_parquet(path, columns, images)]


def _of_parquet(path: Path, columns: Columns, images: Path | None) -> list[Item]:
    """The rows of a parquet file; class numbers that `datasets` has made are names again."""
    from w2s.data.shards.parquet import class_names, image_columns, read_schema, read_texts

    schema = read_schema(path)
    there, pictures = list(schema.names), image_columns(schema)
    if not pictures:
        return _of_records(path, read_texts(path, there), columns, images)
    if images is not None:
        raise DataError(f"--images is for the paths of a table, and {path} has images inside: leave it out")
    key = (choose(pictures, columns.image, IMAGE_COLUMNS, path) or pictures[0]).lower()
    caption, label = _beside(path, [name for name in there if name not in pictures], columns)
    names = class_names(schema, label) if label else []
    records = read_texts(path, [name for name in (caption, label) if name])
    return [
        Item(path, texts(record, caption), tuple(_named(each, names) for each in texts(record, label)), row, key)
        for row, record in enumerate(records)
    ]


def _named(label: str, names: Sequence[str]) -> str:
    """The name of a class that is a number."""
    return names[int(label)] if label.isdecimal() and int(label) < len(names) else label
