"""A run from parquet files is the run from the tar files with their samples."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from tests.data.parquet_files import IMAGE, write_rows
from tests.stages.conftest import Material
from tests.stages.runs import history, result, run_stage
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards

SCHEMA = pa.schema([("image", IMAGE), ("text", pa.string()), ("cls", pa.int64())])


def rewritten(shards: Path, folder: Path) -> Path:
    for shard in list_shards(str(shards)):
        files = [sample.files for sample in read_shard(shard)]
        rows = [
            {"image": {"bytes": each["png"]}, "text": each["txt"].decode(), "cls": int(each["cls"])} for each in files
        ]
        write_rows(folder / f"{Path(shard).stem}.parquet", rows, SCHEMA, group=5)
    shutil.copy(shards / "classnames.txt", folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, material: Material) -> Material:
    folder = tmp_path_factory.mktemp("rows")
    train, test = (rewritten(shards, folder / shards.name) for shards in (material.train, material.test))
    return Material(train, test, material.teacher, material.store)


def test_a_run_from_parquet_files(base: list[str], material: Material, rows: Material) -> None:
    keys = ["data.image_key=png;image", "data.caption_key=txt;text", "tracking.enabled=false", "tracking.pictures=0"]
    runs = []
    for name, kind in (("tar", material), ("parquet", rows)):
        places = [f"data.train={kind.train}", f"eval.shards={kind.test}", f"eval.knn_shards={kind.train}"]
        runs.append(run_stage("clip", [*base, *keys, *places, "init.vision=none", "train.steps=2", f"run.name={name}"]))
    tar, parquet = runs
    assert history(parquet, "loss") == history(tar, "loss")
    assert result(parquet)["metrics"] == result(tar)["metrics"]
