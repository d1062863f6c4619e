"""Tables that name images: `.csv`, `.tsv`, `.jsonl`, a list in `.json`, and COCO's caption files."""

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")

Record = dict[str, Any]

IMAGE_COLUMNS = ("image", "file_name", "filename", "path", "filepath", "file", "img")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "sentences")
CLASS_COLUMNS = ("class", "label")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of a table or a parquet file; of an empty name the first usual one that is there."""

    image: str = ""
    caption: str = ""
    label: str = ""


def choose(columns: Collection[str], named: str, usual: Sequence[str], path: Path) -> str | None:
    """Return the column that is named, or else the first usual one that is there, in capitals too.

    Raises:
        DataError: the named one is not there.
    """
    if named and named not in columns:
        raise DataError(f"{path} has no column {named}, only {', '.join(columns)}: name one of these")
    spelled = {column.lower(): column for column in columns}
    return named or next((spelled[name] for name in usual if name in spelled), None)


def texts(record: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    """Return what a record has in a column: a text, several of a list, or none; blank ones are left out."""
    value = record.get(column) if column else None
    if not isinstance(value, list):
        text = "" if value is None else str(value).strip()
        return (text,) if text else ()
    # `sentences` of COCO's copies on the hub are {raw: ..., tokens: ...}.
    plain = (each.get("raw") if isinstance(each, Mapping) else each for each in value)
    return tuple(text for each in plain if each is not None and (text := " ".join(str(each).split())))


def read_table(path: Path) -> list[Record]:
    """Return the records of a table; of a COCO caption file those of its images, each with a list of captions.

    Raises:
        DataError: it cannot be read, or is another kind of file.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin their files with a mark
            if path.suffix == ".json":
                return _of_document(json.load(file), path)
            if path.suffix == ".jsonl":
                return [dict(json.loads(line)) for line in file if line.strip()]
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def image_folder(path: Path, first: str) -> Path:
    """Return the folder of a table's images: its own, or one of COCO's beside `annotations/captions_SPLIT.json`.

    Args:
        path: the table.
        first: what it calls its first image.
    """
    split = path.stem.rpartition("_")[2]
    names = ("", split, "images", f"images/{split}") if path.suffix == ".json" else ("",)
    places = [folder / name for folder in (path.parent, path.parent.parent) for name in names]
    return next((place for place in places if (place / first).is_file()), path.parent)


def _of_document(document: Any, path: Path) -> list[Record]:
    if isinstance(document, list):
        return [dict(record) for record in document]
    try:
        names = {image["id"]: image["file_name"] for image in document["images"]}
        captions: dict[str, list[str]] = {}
        for note in document["annotations"]:
            captions.setdefault(names[note["image_id"]], []).append(note["caption"])
    except (LookupError, TypeError) as error:
        raise DataError(
            f"{path} is neither a list of records nor a COCO caption file ({error!r}): that has `images` with an id "
            "and a file_name, and `annotations` with an image_id and a caption"
        ) from error
    return [{"image": name, "caption": several} for name, several in captions.items()]
