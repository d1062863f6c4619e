"""What `w2s data make` makes shards of: images in folders, named by tables, or inside of parquet files."""

import csv
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s.data.clips import extension_of, kind
from w2s.data.containers import read_shard
from w2s.data.shards import is_parquet
from w2s.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi")
_TABLES = (".csv", ".tsv", ".jsonl")

_METADATA = ("metadata.csv", "metadata.jsonl")
"""Tables that name the images of a folder, by the rules of Hugging Face's `datasets`."""
_IMAGE_COLUMNS = ("image", "file_name", "path", "filepath", "file")
_CAPTION_COLUMNS = ("caption", "title", "text")
_CLASS_COLUMNS = ("class", "label")


@dataclass(frozen=True)
class Item:
    """One image, clip or video with what belongs to it."""

    image: Path
    """Its file, or the parquet file that has it."""
    caption: str | None
    """Several are on lines of their own."""
    label: str | None
    """Name of its class; several are on lines of their own."""
    row: int = 0
    """Its row in a parquet file."""

    @property
    def classes(self) -> list[str]:
        """Names of its classes."""
        return [] if self.label is None else self.label.split("\n")


def find_items(source: Path) -> list[Item]:
    """Find the images of a folder, a table or a parquet file, in their order.

    Raises:
        DataError: there is none, or one is missing.
    """
    if is_parquet(str(source)):
        items = _read_parquet(source)
    else:
        items = _read_table(source) if source.suffix in _TABLES else _read_folder(source)
    if not items:
        raise DataError(f"{source} has no images: there are none that end in .{', .'.join((*IMAGES, *VIDEOS))}")
    return items


def read_images(items: Sequence[Item]) -> Iterator[dict[str, bytes]]:
    """Read the image of each item, or the images of its clip, by extension.

    Args:
        items: files in any order, or rows of a parquet file in theirs.
    """
    if not is_parquet(str(items[0].image)):
        yield from ({item.image.suffix[1:].lower(): item.image.read_bytes()} for item in items)
        return
    path, rows = items[0].image, {item.row for item in items}
    samples = read_shard(str(path), min(rows), {_image_column(path)})
    for row, sample in zip(range(min(rows), max(rows) + 1), samples, strict=False):
        if sample.damage or (row in rows and not sample.files):
            raise DataError(f"{path}: {sample.key}: {sample.damage or 'image is missing'}, repair the file")
        if row in rows:
            yield {name.removesuffix(kind(name)) + extension_of(data): data for name, data in sample.files.items()}


def _read_folder(folder: Path) -> list[Item]:
    """Those below a folder, in the order of their paths, or those that the folder's metadata name."""
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder nor a {', '.join(_TABLES)} or .parquet file")
    tables = sorted(path for path in folder.rglob("metadata.*") if path.name in _METADATA)
    if tables and tables[0].parent == folder:
        return _read_table(tables[0])
    if tables:
        raise DataError(f"{folder} has no {' or '.join(_METADATA)}, but {tables[0].parent} has: name that folder")
    images = [path for path in sorted(folder.rglob("*")) if path.suffix[1:].lower() in (*IMAGES, *VIDEOS)]
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


def _read_table(path: Path) -> list[Item]:
    """Those that a table names, in its order; paths are relative to it."""
    rows = _rows(path)
    columns = list(rows[0]) if rows else []
    image, caption, label = (_column(columns, names) for names in (_IMAGE_COLUMNS, _CAPTION_COLUMNS, _CLASS_COLUMNS))
    if rows and image is None:
        raise DataError(f"{path} has the columns {', '.join(columns)}: name the one with the files `image`")
    items = [
        # A row that ends early has None in its last columns.
        Item(path.parent / (_text(row, image) or ""), _text(row, caption), _text(row, label))
        for row in rows
    ]
    missing = [item.image for item in items if not item.image.is_file()]
    if missing:
        raise DataError(f"{path}: {len(missing)} of {len(items)} images are missing, the first is {missing[0]}")
    return items


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin their files with a mark
            if path.suffix == ".jsonl":
                return [dict(json.loads(line)) for line in file if line.strip()]
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_parquet(path: Path) -> list[Item]:
    """The rows of a parquet file; class numbers that `datasets` has made are names again."""
    from w2s.data.parquet import class_names, read_texts

    rows = read_texts(path, (*_CAPTION_COLUMNS, *_CLASS_COLUMNS))
    columns = list(rows[0]) if rows else []
    caption, label = (_column(columns, names) for names in (_CAPTION_COLUMNS, _CLASS_COLUMNS))
    names = class_names(path, label) if label else []
    return [
        Item(path, _text(values, caption), _named(_text(values, label), names), row) for row, values in enumerate(rows)
    ]


def _image_column(path: Path) -> str:
    """The column of a parquet file that has the images."""
    from w2s.data.parquet import image_columns

    columns = image_columns(path)
    if not columns:
        raise DataError(f"{path} has no images: there is no column of bytes")
    return _column(columns, _IMAGE_COLUMNS) or columns[0]


def _named(label: str | None, names: Sequence[str]) -> str | None:
    """The name of a class that is a number."""
    return names[int(label)] if label and label.isdecimal() and int(label) < len(names) else label


def _text(row: Mapping[str, Any], column: str | None) -> str | None:
    """What a row has in a column, if there is one; of several captions each is a line."""
    value = row.get(column) if column else None
    if isinstance(value, list):
        return "\n".join(" ".join(str(each).split()) for each in value)
    return None if value is None else str(value)


def _column(columns: Collection[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)
