"""Parquet files for tests, with the samples of the tar files of `shard_files`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.shard_files import Files, good_sample

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""As Hugging Face's `datasets` writes an image."""


def write_rows(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema | None = None, group: int = 3) -> None:
    """Write rows by column, in row groups of `group`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=group)


def write_twins(folder: Path, sizes: Sequence[int], replace: dict[str, Files]) -> Path:
    """Write the samples that `write_shards` writes, as rows of an image and a text."""
    schema = pa.schema([("image", IMAGE), ("text", pa.string())])
    for shard, size in enumerate(sizes):
        samples = [replace.get(f"{shard:02d}-{n:03d}", good_sample(shard * 1000 + n)) for n in range(size)]
        rows = [
            {
                "image": {"bytes": files.get("png"), "path": "a.png"},
                "text": files["txt"].decode() if "txt" in files else None,
            }
            for files in samples
        ]
        write_rows(folder / f"{shard:06d}.parquet", rows, schema)
    return folder
