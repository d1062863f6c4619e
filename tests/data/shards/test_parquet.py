import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.parquet_files import IMAGE, write_rows, write_twins
from tests.data.shard_files import encode, noise, write_shards
from tests.data.stream.test_stream import BAD, REASONS, SIZES, SPEC
from tests.data.streams import Group, assert_same
from w2s.config.sections import DataConfig
from w2s.data.making.shard_report import check_shards, describe_shards, draw_sheet
from w2s.data.samples.captions import read_caption
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.data.shards.raw_sample import find_images
from w2s.data.shards.sizes import count_samples, index_shards
from w2s.data.stream.sources import check_source
from w2s.errors import ConfigError, DataError

IMAGES = [encode(noise(index)) for index in range(4)]
BATCH, STEPS = 16, 8


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("tars") / "train", SIZES, BAD)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples in parquet files, three a row group."""
    return write_twins(tmp_path_factory.mktemp("parquet") / "train", SIZES, BAD)


def open_group(folder: Path, size: int = 1, position: Any = None, **changes: Any) -> Group:
    settings: dict[str, Any] = {"lanes": 8, "shuffle": 4, "workers": 0, "max_bad_fraction": 1.0}
    spec = replace(SPEC, image_key="png;image", caption_key="txt;text")
    data = DataConfig(train=str(folder), **(settings | changes))
    return Group(data, spec, batch=BATCH, seed=5, size=size, position=position)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_parquet_file_gives_the_batches_of_the_tar_file_with_its_samples(
    tars: Path, rows: Path, replacement: bool
) -> None:
    of_tars, of_rows = (open_group(folder, replacement=replacement) for folder in (tars, rows))
    with closing(of_tars), closing(of_rows):
        assert_same(of_rows.read(STEPS), of_tars.read(STEPS), keys=False)
        assert of_rows.streams[0].bad == of_tars.streams[0].bad
        assert replacement or set(of_rows.streams[0].bad) == set(REASONS)


def test_a_run_resumes_with_other_ranks_and_workers(rows: Path) -> None:
    with closing(open_group(rows)) as group:
        whole = group.read(STEPS)
    with closing(open_group(rows, 4)) as group:
        group.read(3)
        position = group.position()
    with closing(open_group(rows, 2, position, workers=2)) as group:
        assert_same(group.read(STEPS - 3), whole[3:])


def test_reading_resumes_at_every_row(rows: Path) -> None:
    shard = list_shards(str(rows))[5]
    whole = list(read_shard(shard, wanted={"image", "text"}))
    assert [sample.key for sample in whole] == [f"row {index}" for index in range(SIZES[5])]
    for index, sample in enumerate(whole):
        assert list(read_shard(shard, sample.end, wanted={"image", "text"})) == whole[index + 1 :]


@pytest.fixture
def kinds(tmp_path: Path) -> str:
    """A file with a column of each kind."""
    schema = pa.schema(
        [
            ("image", IMAGE),
            ("JPG", pa.large_binary()),
            ("frames", pa.list_(IMAGE)),
            ("000.gif", pa.binary()),
            ("text", pa.large_string()),
            ("captions", pa.list_(pa.string())),
            ("label", pa.int64()),
            ("when", pa.timestamp("s")),
        ]
    )
    whole = {
        "image": {"bytes": IMAGES[0], "path": "a.png"},
        "JPG": IMAGES[1],
        "000.gif": IMAGES[3],
        "frames": [{"bytes": image, "path": None} for image in IMAGES],
        "text": "caf\xe9",
        "captions": ["one", "two"],
        "label": 3,
        "when": 0,
    }
    empty = {"image": {"bytes": None, "path": "gone.png"}, "text": None, "label": None}
    write_rows(tmp_path / "kinds" / "a.parquet", [whole, empty], schema)
    return str(tmp_path / "kinds" / "a.parquet")


def test_columns_are_files(kinds: str) -> None:
    whole, empty = read_shard(kinds)
    assert find_images(whole.files, "image") == [IMAGES[0]]
    assert find_images(whole.files, "jpg") == [IMAGES[1]]
    assert find_images(whole.files, "frames") == IMAGES
    assert find_images(whole.files, "gif") == [IMAGES[3]]
    assert whole.files["text"].decode() == "caf\xe9"
    assert whole.files["label"] == b"3"
    assert "captions" not in whole.files
    drawn = {read_caption(whole, "json.captions", generator(0, Purpose.CAPTION, n)) for n in range(20)}
    assert drawn == {"one", "two"}
    assert read_caption(whole, "json.text", generator(0, Purpose.CAPTION, 0)) == "caf\xe9"
    assert set(empty.files) == {"json"}
    (only, _) = read_shard(kinds, wanted={"gif", "jpg", "label"})
    assert only.files == {"jpg": IMAGES[1], "000.gif": IMAGES[3], "label": b"3"}
    assert [sample.files for sample in read_shard(kinds, wanted=())] == [{}, {}]


def test_a_path_without_bytes_is_read_beside_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(IMAGES[1])
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "2.png").write_bytes(IMAGES[2])
    paths = [str(tmp_path / "1.png"), "b/2.png", "b", "3.png", None]
    rows = [{"image": {"bytes": None, "path": path}} for path in paths]
    write_rows(tmp_path / "a" / "a.parquet", rows, pa.schema([("image", IMAGE)]))
    files = [sample.files for sample in read_shard(str(tmp_path / "a" / "a.parquet"), wanted={"image"})]
    assert files == [{"image": IMAGES[1]}, {"image": IMAGES[2]}, {}, {}, {}]
    fsspec.filesystem("memory").pipe_file("/paths/a.parquet", (tmp_path / "a" / "a.parquet").read_bytes())
    assert all(not sample.files for sample in read_shard("memory://paths/a.parquet", wanted={"image"}))


def test_a_column_json_is_the_json_file(tmp_path: Path) -> None:
    captions = {"caption": ["a"]}
    write_rows(tmp_path / "text.parquet", [{"jpg": IMAGES[0], "json": json.dumps(captions)}])
    write_rows(tmp_path / "struct.parquet", [{"jpg": IMAGES[0], "json": captions}])
    for shard in ("text", "struct"):
        (sample,) = read_shard(str(tmp_path / f"{shard}.parquet"))
        assert json.loads(sample.files["json"]) == captions


def test_what_a_source_lacks_is_named_at_the_start(kinds: str, tmp_path: Path) -> None:
    defaults = DataConfig()
    check_source([kinds], defaults.image_key, defaults.caption_key)
    check_source([kinds], "frames", "json.captions")
    with pytest.raises(
        DataError, match=r"has no image '.bmp', only .frames, .gif, .image, .jpg, .json, .label, .text: set data"
    ):
        check_source([kinds], "bmp", None)
    with pytest.raises(DataError, match=r"sample row 0 of .*a.parquet has no caption '.captions', only .*: set data"):
        check_source([kinds], "image", "captions")


def damaged(path: Path, group: int) -> Path:
    """Overwrite the header of the first page of a row group's images, which is where the group begins."""
    images = pq.ParquetFile(path).metadata.row_group(group).column(0)
    place = images.dictionary_page_offset or images.data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    return path


def test_damage_ends_a_file_and_the_row_groups_before_and_behind_are_read(tmp_path: Path) -> None:
    folder = write_twins(tmp_path / "a", [9, 9, 9], {})
    middle = str(damaged(folder / "000000.parquet", 1))
    assert [sample.damage for sample in read_shard(middle)] == ["", "", "", "shard is damaged"]
    assert [sample.key for sample in read_shard(middle, 6)] == ["row 6", "row 7", "row 8"], (
        "what is skipped is not read"
    )
    cut = folder / "000001.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    (folder / "000002.parquet").write_bytes(b"")
    for name in ("000001", "000002"):
        assert [sample.damage for sample in read_shard(str(folder / f"{name}.parquet"))] == ["shard is damaged"]
    write_rows(folder / "3.parquet", [], pa.schema([("image", IMAGE)]))
    assert list(read_shard(str(folder / "3.parquet"))) == [], "it is empty"
    assert [sample.damage for sample in read_shard(str(folder / "4.parquet"))] == ["shard is gone"]


def test_a_file_that_is_too_large_is_left_out(kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s.data.shards.parquet.MAX_FILE", len(IMAGES[0]) - 1)
    assert [sample.damage for sample in read_shard(kinds, wanted={"image"})] == ["file is too large", ""]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    folder = write_twins(tmp_path / "remote", [8], {})
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/rows/000000.parquet", (folder / "000000.parquet").read_bytes())
    yield "memory://rows/"
    memory.rm("/rows", recursive=True)


def test_a_server_that_breaks_off_costs_nothing_and_one_that_is_gone_the_file(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = list_shards(remote)
    whole = [sample.files for sample in read_shard(str(tmp_path / "remote" / "000000.parquet"))]
    monkeypatch.setattr("w2s.data.shards.storage.SourceConnection.pause", lambda *_: None)
    kind_of_file = type(fsspec.open(shard).open())
    plain, answers = kind_of_file.read, itertools.cycle([False, True])

    def read_or_fail(file: Any, size: int = -1) -> Any:
        if not next(answers):
            raise ConnectionError("503 Service Unavailable")
        return plain(file, size)

    monkeypatch.setattr(kind_of_file, "read", read_or_fail)
    assert [sample.files for sample in read_shard(shard)] == whole
    answers = itertools.repeat(False)
    assert [sample.damage for sample in read_shard(shard)] == ["shard cannot be read"]


def test_which_files_of_a_folder_are_shards(rows: Path, tmp_path: Path) -> None:
    folder = write_twins(tmp_path / "mixed", [2, 2], {})
    assert [Path(shard).name for shard in list_shards(str(folder))] == ["000000.parquet", "000001.parquet"]
    assert len(list_shards(f"{folder}/{{000000..000001}}.parquet")) == 2
    write_shards(folder, [2])
    assert [Path(shard).name for shard in list_shards(str(folder))] == ["000000.tar"], "img2dataset writes lists beside"
    assert len(list_shards(f"{folder}/*.parquet,{folder}")) == 3
    with pytest.raises(ConfigError, match="is a stream, and parquet files are read from their ends: name the file"):
        list_shards("pipe:cat a.parquet", allow_pipe=True)


def test_files_are_counted_checked_and_shown(rows: Path, tmp_path: Path) -> None:
    shards, defaults = list_shards(str(rows)), DataConfig()
    assert index_shards(shards, tmp_path / "index") == dict(zip(shards, SIZES, strict=True))
    assert count_samples(shards, tmp_path / "index") == sum(SIZES)
    report = check_shards(shards, defaults.image_key, defaults.caption_key, workers=2)
    assert (report.shards, report.samples, report.bad) == (8, sum(SIZES), REASONS)
    lines = list(describe_shards(shards))
    assert lines[0].endswith("000000.parquet: 5 samples")
    assert lines[-1].startswith("row 0: .image (")
    assert draw_sheet(shards, defaults.image_key, defaults.caption_key, 5, tmp_path / "sheet.png") == 5
