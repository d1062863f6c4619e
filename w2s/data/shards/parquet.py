"""Shards that are parquet files: a row is a sample, and its columns are the sample's files.

A column of bytes, or of `{bytes, path}` as Hugging Face's `datasets` writes images, is a file under the column's name,
and so is one of text or numbers. Where it wrote a path alone, beside a local file the image is read from there. A list
of images is numbered files, as those of a clip. All columns but images are together the sample's `json`.
"""

import json
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from w2s.data.shards.raw_sample import RawSample, kind
from w2s.data.shards.storage import SourceConnection, is_local, open_at
from w2s.data.shards.tar import MAX_FILE
from w2s.errors import DataError

_BUFFER = 1 << 20
"""Bytes that a column is read by, where its pages are smaller."""
_ROWS = 16
"""Rows that become Python's objects at a time."""
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)


def read_parquet(shard: str, start: int, wanted: Container[str] | None, link: SourceConnection) -> Iterator[RawSample]:
    """Yield the samples of a parquet file from a row on; row groups before it are not read. See `containers`."""
    try:
        with open_at(shard, 0, link) as stream:
            file = pq.ParquetFile(pa.PythonFile(stream, mode="r"), buffer_size=_BUFFER)
            folder, first = Path(shard.removeprefix("file://")).parent if is_local(shard) else None, 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if start < first + count:
                    for row, files in enumerate(_read_group(file, group, wanted, folder), first):
                        if row >= start:
                            damage = "file is too large" if max(map(len, files.values()), default=0) > MAX_FILE else ""
                            yield RawSample(f"row {row}", shard, {} if damage else files, damage, end=row + 1)
                first += count
    except OSError as error:
        # pyarrow says so of damage too, but not because of another error, as a file does that cannot be read.
        if error.errno is None and error.__cause__ is None:
            raise ValueError(f"{shard} is damaged") from error
        raise


def read_schema(path: Path) -> pa.Schema:
    """Return the columns of a local file.

    Raises:
        DataError: it cannot be read.
    """
    with _readable(path) as file:
        return file.schema_arrow


def image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that have images."""
    return [field.name for field in schema if _has_images(field.type)]


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of the classes that a column numbers, where `datasets` has noted them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (LookupError, TypeError, ValueError):
        return []


def read_texts(path: Path, columns: Collection[str]) -> list[dict[str, Any]]:
    """Return those of some columns that a local file has, row by row.

    Raises:
        DataError: it cannot be read.
    """
    with _readable(path) as file:
        names = [name for name in file.schema_arrow.names if name in columns]
        rows: list[dict[str, Any]] = file.read(names, use_threads=False).to_pylist() if names else []
        return rows or [{}] * file.metadata.num_rows


@contextmanager
def _readable(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_group(
    file: pq.ParquetFile, group: int, wanted: Container[str] | None, folder: Path | None
) -> Iterator[dict[str, bytes]]:
    """The files of each row of a row group. Paths are relative to `folder`, and without one they are not followed.

    The columns beside the images are small and read first, so that a stream from a server goes back only once.
    """
    fields = list(file.schema_arrow)
    joined = _is_wanted("json", wanted) and not any(field.name.lower() == "json" for field in fields)
    images = [field.name for field in fields if _has_images(field.type) and _is_wanted(field.name, wanted)]
    texts = [
        field.name for field in fields if not _has_images(field.type) and (joined or _is_wanted(field.name, wanted))
    ]
    count = file.metadata.row_group(group).num_rows
    beside = file.read_row_group(group, texts, use_threads=False).to_pylist() if texts else repeat({}, count)
    batches = file.iter_batches(_ROWS, row_groups=[group], columns=images, use_threads=False) if images else ()
    pictures = (row for batch in batches for row in batch.to_pylist()) if images else repeat({}, count)
    for text, picture in zip(beside, pictures, strict=True):
        together = {"json": json.dumps(text, default=str).encode()} if joined else {}
        yield dict(_image_files(picture, folder)) | dict(_text_files(text, wanted)) | together


def _is_wanted(column: str, wanted: Container[str] | None) -> bool:
    return wanted is None or kind(column.lower()) in wanted


def _has_images(column: pa.DataType) -> bool:
    """Whether a column has bytes, `{bytes, path}`, or lists of these."""
    if pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column):
        return _has_images(column.value_type)
    if pa.types.is_struct(column):
        return column.get_field_index("bytes") >= 0 and _has_images(column.field("bytes").type)
    return any(is_binary(column) for is_binary in _BINARY)


def _image_files(row: Mapping[str, Any], folder: Path | None) -> Iterator[tuple[str, bytes]]:
    """The files that are images, by extension."""
    for column, value in row.items():
        name = column.lower()
        several = isinstance(value, list)
        contents = {f"{index:03d}.{name}": each for index, each in enumerate(value)} if several else {name: value}
        for extension, content in contents.items():
            data = content
            if isinstance(content, dict):
                data = _read_path(folder, content.get("path")) if content["bytes"] is None else content["bytes"]
            if data is not None:
                yield extension, data


def _read_path(folder: Path | None, path: object) -> bytes | None:
    """The file that `datasets` has named instead of its bytes; None where there is none."""
    if folder is None or not isinstance(path, str) or not (folder / path).is_file():
        return None
    with (folder / path).open("rb") as file:
        return file.read(MAX_FILE + 1)


def _text_files(row: Mapping[str, Any], wanted: Container[str] | None) -> Iterator[tuple[str, bytes]]:
    """The files that are text or a number, by extension; a column `json` may be anything."""
    for column, value in row.items():
        if value is None or not _is_wanted(column, wanted):
            continue
        if isinstance(value, str | int | float):
            yield column.lower(), str(value).encode()
        elif column.lower() == "json":
            yield "json", json.dumps(value, default=str).encode()
