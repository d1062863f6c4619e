"""The data sets that a run reads, as MLflow notes them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from w2s.redaction import redact

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_BUCKETS = ("s3", "gs", "wasbs", "hdfs")
"""Schemes whose name is that of MLflow's source type."""


class DataInput(NamedTuple):
    """A data set that a run read.

    Attributes:
        name: name of the data set.
        source: its shards, as in the configuration.
        digest: hash of the list of shards and their sizes.
        context: what it was used for, such as `training`.
    """

    name: str
    source: str
    digest: str
    context: str


def source_of(shards: str) -> tuple[str, dict[str, object]]:
    """The type and the fields of a source that `mlflow.data.get_source` reads.

    Args:
        shards: a folder, a pattern or a URL, without credentials. What MLflow has no type for (a pipe, a Hugging Face
            path, several joined by `::`) is a source of type `code` with the shards in its tags.
    """
    scheme, has_scheme, _ = shards.partition(":")
    if "::" not in shards and scheme in ("http", "https"):
        return "http", {"url": shards}
    if "::" not in shards and scheme in _BUCKETS:
        return scheme, {"uri": shards}
    if has_scheme and scheme != "file":
        return "code", {"tags": {"shards": shards}}
    return "local", {"uri": shards if has_scheme else str(Path(shards).expanduser().absolute())}


def to_mlflow(item: DataInput) -> "DatasetInput":
    """A data set as an entity of MLflow."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind, fields = source_of(redact(item.source))
    dataset = Dataset(item.name, item.digest, kind, json.dumps(fields))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", item.context)])
