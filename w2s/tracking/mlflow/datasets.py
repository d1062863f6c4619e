"""The data sets that a run reads, as MLflow notes them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from w2s.redaction import redact

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_FIELDS = {"http": "url", "https": "url", "s3": "uri", "gs": "uri", "wasbs": "uri", "hdfs": "uri"}
"""By scheme, the field of MLflow's source type, which is called after the scheme."""


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


def to_mlflow(item: DataInput) -> "DatasetInput":
    """A data set as an entity of MLflow."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind, fields = _source(redact(item.source))
    dataset = Dataset(item.name, item.digest, kind, json.dumps(fields))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", item.context)])


def _source(shards: str) -> tuple[str, dict[str, object]]:
    """The type and the fields of a source that `mlflow.data.get_source` reads.

    What MLflow has no type for (a pipe, a Hugging Face path, several joined by `::`) is of type `code`, with the shards
    in its tags.
    """
    scheme, has_scheme, _ = shards.partition(":")
    if not has_scheme:
        return "local", {"uri": str(Path(shards).expanduser().absolute())}
    if "::" in shards or scheme not in (*_FIELDS, "file"):
        return "code", {"tags": {"shards": shards}}
    kind = {"https": "http", "file": "local"}.get(scheme, scheme)
    return kind, {_FIELDS.get(scheme, "uri"): shards}
