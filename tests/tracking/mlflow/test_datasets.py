from pathlib import Path

import mlflow.data
import pytest

from w2s.tracking.mlflow.datasets import DataInput, to_mlflow


@pytest.mark.parametrize(
    ("shards", "kind", "fields"),
    [
        ("shards/{0..3}.tar", "local", {"uri": str(Path("shards/{0..3}.tar").absolute())}),
        ("https://host/{0..3}.tar", "http", {"url": "https://host/{0..3}.tar"}),
        ("https://me:secret@host/0.tar", "http", {"url": "https://me:***@host/0.tar"}),
        ("s3://bucket/a.tar", "s3", {"uri": "s3://bucket/a.tar"}),
        ("gs://bucket/a.tar", "gs", {"uri": "gs://bucket/a.tar"}),
        ("wasbs://bucket/a.tar", "wasbs", {"uri": "wasbs://bucket/a.tar"}),
        ("hdfs://host/a.tar", "hdfs", {"uri": "hdfs://host/a.tar"}),
        ("pipe:cat a.tar", "code", {"tags": {"shards": "pipe:cat a.tar"}}),
        ("hf://datasets/a/b", "code", {"tags": {"shards": "hf://datasets/a/b"}}),
        ("a.tar::b.tar", "code", {"tags": {"shards": "a.tar::b.tar"}}),
    ],
)
def test_mlflow_reads_the_source(shards: str, kind: str, fields: dict[str, object]) -> None:
    source = mlflow.data.get_source(to_mlflow(DataInput("emoji", shards, "abc", "training")))
    assert (source._get_source_type(), source.to_dict()) == (kind, fields)
