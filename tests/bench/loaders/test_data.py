import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.shard_files import encode, smooth_photo
from w2s import cli
from w2s.bench.loaders.data import Shards, _boxes, _difference, spec
from w2s.bench.loaders.photographs import cut_shards
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.errors import DataError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(2):
        grain = np.random.default_rng(index).integers(-20, 20, (1400, 1800, 3))
        pixels = np.clip(smooth_photo(1400, 1800).astype(int) + grain, 0, 255).astype(np.uint8)
        (folder / f"{index}.jpg").write_bytes(encode(pixels, "JPEG", quality=95))
    (folder / "small.jpg").write_bytes(encode(smooth_photo(), "JPEG"))
    return folder


def test_every_picture_has_a_size_of_its_own(photographs: Path, tmp_path: Path) -> None:
    pattern = cut_shards(photographs, tmp_path / "a", 500, 400, 130)
    jpegs = [sample.files["jpg"] for shard in list_shards(pattern) for sample in read_shard(shard)]
    (tmp_path / "one.jpg").write_bytes(b"")
    sizes = {Image.open(_file(tmp_path, data)).size for data in jpegs}
    assert len(jpegs) == len(sizes) == 130
    assert all(abs(width / 500 - 1) < 0.07 and abs(height / 400 - 1) < 0.07 for width, height in sizes)
    with pytest.raises(DataError, match="has no photograph of at least 2650 x 2120 pixels"):
        cut_shards(photographs, tmp_path / "b", 2500, 2000, 4)


def _file(folder: Path, data: bytes) -> Path:
    (folder / "one.jpg").write_bytes(data)
    return folder / "one.jpg"


def test_both_loaders_make_the_same_tensors(photographs: Path, tmp_path: Path) -> None:
    """The same crop of each image, and at most 3/255 between the two ways to decode and resize it."""
    shards = Shards("small", cut_shards(photographs, tmp_path / "a", 500, 400, 32), 32)
    assert len(_boxes(shards, spec((0.9, 1.0)))) == 32
    assert 0 < _difference(shards, spec((0.9, 1.0))) <= 3


@pytest.mark.slow
def test_the_benchmark_measures_both_sizes(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "256", "--repeats", "1", "--workers", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["w2s", "bench", "data", str(photographs), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    figures = json.loads(capfd.readouterr().out)  # one document and nothing else
    for size in ("500x400", "1600x1200"):
        assert figures[size]["open_clip"]["ratio"] == 1
        assert figures[size]["w2s"]["difference_0.9-1"] <= 3
        # Nothing about the ratio: a test does not measure time.
        assert figures[size]["w2s"]["ratio"] > 0


@pytest.mark.slow
def test_the_benchmark_reads_over_a_slow_server_and_from_the_disk(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "128", "--workers", "1", "--latency", "5", "--bandwidth", "50", "--json"]
    monkeypatch.setattr("sys.argv", ["w2s", "bench", "data", str(photographs), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    figures = json.loads(capfd.readouterr().out)
    for place in ("server", "disk"):
        for loader in ("open_clip", "w2s"):
            assert all(value > 0 for value in figures[place][loader].values())
