"""What w2s uses of webdataset, on the version that is installed; `make test` runs it on the oldest one too."""

import hashlib
import io
import tarfile
from pathlib import Path

import webdataset

from tests.data.shard_files import encode, smooth_photo, write_shard
from w2s.bench.loaders.data import BATCH, Shards, open_clip_images
from w2s.data.shards.containers import read_shard


def test_shards_have_the_same_bytes_with_every_version(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a/b.c", {"png": b"1", "json": b"{}"}), ("d", {"000.JPG": b"2"})])
    digest = hashlib.sha256((tmp_path / "0.tar").read_bytes()).hexdigest()
    assert digest == "34b67250afe070d5c7c3b18c851d85233b2f976d16a44061ea06dff6727f6196", webdataset.__version__


def test_names_are_taken_apart_as_webdataset_does(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("x.y/a.seg.png", "x.y/a.txt", "x.y/b.png", ".hidden", "plain"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    ours = {sample.key: set(sample.files) for sample in read_shard(str(tmp_path / "0.tar"))}
    pipeline = webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False)
    theirs = {one["__key__"]: {name for name in one if not name.startswith("__")} for one in pipeline}
    assert ours == theirs


def test_open_clips_loader_reads_shards(tmp_path: Path) -> None:
    image = encode(smooth_photo(64, 64), "JPEG")
    write_shard(tmp_path / "0.tar", [(str(index), {"jpg": image, "txt": b"a"}) for index in range(BATCH)])
    (batch,) = open_clip_images(Shards("small", str(tmp_path / "0.tar"), BATCH), None, workers=0)
    assert batch.shape[:2] == (BATCH, 3)
