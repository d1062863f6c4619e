"""What a source lacks is said at the start."""

import gzip
from pathlib import Path

import pytest

from tests.data.shard_files import write_shard, write_shards
from w2s.data.shards.containers import read_shard
from w2s.data.stream.sources import check_source
from w2s.errors import DataError


def test_needed_files_are_checked(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x", {"json": b"{}"}), ("y", {"png": b"", "cls": b"1"})])
    check_source([f"{tmp_path}/a.tar"], "jpg;png", None)
    with pytest.raises(DataError, match=r"sample y of .*a.tar has no caption '.txt', only .cls, .json, .png: set data"):
        check_source([f"{tmp_path}/a.tar"], "jpg;png", "txt")
    with pytest.raises(DataError, match=r"a.tar has no image '.jpg', only .cls, .json, .png: set data.image_key"):
        check_source([f"{tmp_path}/a.tar"], "jpg", None)
    write_shard(tmp_path / "b.tar", [])
    with pytest.raises(DataError, match=r"b.tar and the other shards of its source have no samples"):
        check_source([f"{tmp_path}/b.tar"] * 9, "jpg", None)
    check_source([*[f"{tmp_path}/b.tar"] * 9, f"{tmp_path}/a.tar"], "png", None)
    with pytest.raises(DataError, match=r"a.tar has no image '.jpg'"):
        check_source([f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"], "jpg", None)


def test_a_compressed_shard_under_another_name(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    shard = tmp_path / "000000.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert [sample.damage for sample in read_shard(str(shard))] == ["shard is compressed"]
    with pytest.raises(DataError, match=rf"is compressed.*: mv {shard} {shard}.gz; gunzip {shard}.gz"):
        check_source([str(shard)], "png", None)
