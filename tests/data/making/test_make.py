import csv
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.parquet_files import IMAGE, write_rows
from tests.data.shard_files import encode, noise, write_shard
from tests.data.video_files import write_video
from w2s.config.sections import DataConfig
from w2s.data.making.items import find_items
from w2s.data.making.make import make_shards
from w2s.data.making.shard_report import check_shards, describe_shards, draw_sheet
from w2s.data.making.table_files import Columns
from w2s.data.samples.captions import draw_caption
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.data.shards.raw_sample import find_images
from w2s.errors import DataError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven images in two class folders, with captions beside them."""
    for index in range(7):
        path = tmp_path / "pictures" / ("cat" if index % 2 else "ant") / f"{index}.{'jpg' if index < 4 else 'PNG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(index), "JPEG" if index < 4 else "PNG"))
        path.with_suffix(".txt").write_text(f"number {index}\n", encoding="utf-8")
    return tmp_path / "pictures"


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def contents(folder: Path) -> dict[str, tuple[str, ...]]:
    samples = [sample for shard in list_shards(str(folder)) for sample in read_shard(shard)]
    return {sample.files["txt"].decode(): (*sorted(sample.files), sample.files["cls"].decode()) for sample in samples}


def make(source: Path, out: Path, seed: int = 0, workers: int = 1, shard_size: int = 3) -> dict[str, int]:
    return make_shards(find_items(source), out, shard_size=shard_size, seed=seed, workers=workers)


def test_a_folder_becomes_shards(pictures: Path, tmp_path: Path) -> None:
    assert make(pictures, tmp_path / "a") == {"000000.tar": 3, "000001.tar": 3, "000002.tar": 1}
    assert json.loads((tmp_path / "a" / "sizes.json").read_text()) == {
        "000000.tar": 3,
        "000001.tar": 3,
        "000002.tar": 1,
    }
    assert (tmp_path / "a" / "classnames.txt").read_text() == "ant\ncat\n"
    expected = {f"number {n}": ("cls", *sorted(["jpg" if n < 4 else "png", "txt"]), str(n % 2)) for n in range(7)}
    assert contents(tmp_path / "a") == expected


def test_equal_input_and_seed_give_equal_bytes_also_in_parallel_and_after_an_interruption(
    pictures: Path, tmp_path: Path
) -> None:
    make(pictures, tmp_path / "a")
    make(pictures, tmp_path / "b", workers=2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    make(pictures, tmp_path / "c", seed=1)
    assert digest(tmp_path / "c") != digest(tmp_path / "a")
    (tmp_path / "b" / "000001.tar").unlink()
    (tmp_path / "b" / "000001.part").write_bytes(b"half")
    kept = (tmp_path / "b" / "000000.tar").stat().st_mtime_ns
    make(pictures, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert (tmp_path / "b" / "000000.tar").stat().st_mtime_ns == kept


def test_shards_of_another_input_are_not_mixed_in(pictures: Path, tmp_path: Path) -> None:
    make(pictures, tmp_path / "a")
    with pytest.raises(DataError, match="has shards of another input, size or seed: choose another folder"):
        make(pictures, tmp_path / "a", seed=1)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_table_becomes_shards(pictures: Path, tmp_path: Path, suffix: str, delimiter: str) -> None:
    table = pictures / f"table.{suffix}"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["filepath", "title", "label"], ["ant/0.jpg", "a, b", "x"], ["cat/1.jpg", "c", "y"]])
    make(table, tmp_path / "a")
    assert contents(tmp_path / "a") == {"a, b": ("cls", "jpg", "txt", "0"), "c": ("cls", "jpg", "txt", "1")}


def test_a_spreadsheets_table_with_short_rows(pictures: Path, tmp_path: Path) -> None:
    table = pictures / "table.csv"
    table.write_text("image,caption\nant/0.jpg\n", encoding="utf-8-sig")
    assert make(table, tmp_path / "a") == {"000000.tar": 1}
    table.write_text(",image\n0,ant/0.jpg\n")  # as pandas writes its index
    make(table, tmp_path / "b")
    (sample,) = read_shard(str(tmp_path / "b" / "000000.tar"))
    assert set(sample.files) == {"jpg"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_metadata_of_hugging_face(pictures: Path, tmp_path: Path, name: str) -> None:
    rows = [
        {"file_name": "ant/0.jpg", "text": "a, b", "label": "x"},
        {"file_name": "cat/1.jpg", "text": "c", "label": "y"},
    ]
    with (pictures / name).open("w", newline="") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(map(json.dumps, rows)))
    make(pictures, tmp_path / "a")
    assert contents(tmp_path / "a") == {"a, b": ("cls", "jpg", "txt", "0"), "c": ("cls", "jpg", "txt", "1")}
    with pytest.raises(DataError, match=r"has no metadata.csv or metadata.jsonl, but .*pictures has: name that folder"):
        make(tmp_path, tmp_path / "b")


def test_splits_of_a_folder_are_no_classes(pictures: Path, tmp_path: Path) -> None:
    pictures.rename(tmp_path / "test")
    (tmp_path / "both" / "train").mkdir(parents=True)
    (tmp_path / "both" / "train" / "a.png").write_bytes(encode(noise(0)))
    (tmp_path / "test").rename(tmp_path / "both" / "test")
    with pytest.raises(DataError, match=r"both has the splits test, train: name one of them"):
        make(tmp_path / "both", tmp_path / "a")


@pytest.mark.parametrize("place", ["val2014", "images/val2014", "annotations"])
def test_a_coco_caption_file(pictures: Path, tmp_path: Path, place: str) -> None:
    """The images of COCO lie beside the annotations, in a folder of the split; an image has all of its captions."""
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / place).mkdir(parents=True, exist_ok=True)
    for index in range(2):
        (coco / place / f"COCO_{index}.jpg").write_bytes(encode(noise(index), "JPEG"))
    names = [{"id": index, "file_name": f"COCO_{index}.jpg", "height": 20} for index in range(2)]
    notes = [{"image_id": n % 2, "id": n, "caption": f"caption {n}\n"} for n in range(5)]
    document = {"info": {}, "images": names, "annotations": notes}
    table = coco / "annotations" / "captions_val2014.json"
    table.write_text(json.dumps(document))
    found = {item.image.name: item.captions for item in find_items(table)}
    assert found == {
        "COCO_0.jpg": ("caption 0", "caption 2", "caption 4"),
        "COCO_1.jpg": ("caption 1", "caption 3"),
    }
    elsewhere = find_items(table, images=coco / place)
    assert [item.image for item in elsewhere] == [coco / place / name for name in found]
    with pytest.raises(DataError, match=r"2 of 2 images are missing, the first is .* name their folder with --images"):
        find_items(table, images=tmp_path)
    make(table, tmp_path / "a")
    samples = {sample.files["txt"].decode(): sample for sample in read_shard(str(tmp_path / "a" / "000000.tar"))}
    assert json.loads(samples["caption 0"].files["json"]) == {"captions": ["caption 0", "caption 2", "caption 4"]}


def test_another_json_file_is_one_line(pictures: Path, tmp_path: Path) -> None:
    table = pictures / "t.json"
    table.write_text(json.dumps([{"image": "ant/0.jpg", "caption": ["a", "b"]}]))
    assert [item.captions for item in find_items(table)] == [("a", "b")]
    for content in ({"images": []}, {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}, 3):
        table.write_text(json.dumps(content))
        with pytest.raises(DataError, match="is neither a list of records nor a COCO caption file") as caught:
            find_items(table)
        assert "\n" not in str(caught.value)


def test_columns_by_name(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pictures / "metadata.jsonl"
    table.write_text(json.dumps({"file_name": "ant/0.jpg", "prompt": "words", "fine_label": 3, "Text": "others"}))
    (item,) = find_items(pictures, Columns(caption="prompt", label="fine_label"))
    assert (item.captions, item.classes) == (("words",), ("3",))
    assert [item.captions for item in find_items(table)] == [("others",)], "capitals make no difference"
    with pytest.raises(DataError, match=r"has no column prmpt, only file_name, prompt, fine_label, Text: name one"):
        find_items(table, Columns(caption="prmpt"))
    table.write_text(json.dumps({"file_name": "ant/0.jpg", "prompt": "words"}))
    with caplog.at_level(logging.INFO, logger="w2s.data.making.items"):
        find_items(table)
    assert "no captions or classes that are known by their name, only the columns file_name, prompt" in caplog.text
    table.unlink()
    with pytest.raises(DataError, match="so there are no columns to name"):
        find_items(pictures, Columns(caption="prompt"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Seven images in a parquet file, with captions and with class numbers that `datasets` has named."""
    features = {"info": {"features": {"label": {"names": ["ant", "cat"], "_type": "ClassLabel"}}}}
    schema = pa.schema(
        [("image", IMAGE), ("text", pa.list_(pa.string())), ("label", pa.int64())],
        metadata={"huggingface": json.dumps(features)},
    )
    images = [encode(noise(index), "JPEG" if index < 4 else "PNG") for index in range(7)]
    write_rows(
        tmp_path / "rows.parquet",
        [
            {"image": {"bytes": image, "path": None}, "text": [f"number {n}", "twice"], "label": n % 2}
            for n, image in enumerate(images)
        ],
        schema,
    )
    return tmp_path / "rows.parquet"


def test_a_parquet_file_becomes_shards(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(rows, tmp_path / "a") == {"000000.tar": 3, "000001.tar": 3, "000002.tar": 1}
    assert (tmp_path / "a" / "classnames.txt").read_text() == "ant\ncat\n"
    expected = {
        f"number {n}": ("cls", *sorted(["jpg" if n < 4 else "png", "json", "txt"]), str(n % 2)) for n in range(7)
    }
    assert contents(tmp_path / "a") == expected
    samples = [sample for shard in list_shards(str(tmp_path / "a")) for sample in read_shard(shard)]
    drawn = {draw_caption(samples[0], "json.captions", (), np.random.default_rng(n)) for n in range(20)}
    assert drawn == {f"number {int(samples[0].key)}", "twice"}
    assert all(
        find_images(s.files, "jpg;png") == [encode(noise(int(s.key)), "JPEG" if int(s.key) < 4 else "PNG")]
        for s in samples
    )
    # In several passes, in parallel, and after an interruption.
    monkeypatch.setattr("w2s.data.making.make._TOGETHER", 1)
    make(rows, tmp_path / "b", workers=2)
    (tmp_path / "b" / "000001.tar").unlink()
    make(rows, tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for split, count in (("train", 2), ("test", 1)):
        for part in range(count):
            images = [{"img": encode(noise(10 * part + n)), "fine_label": n} for n in range(4)]
            write_rows(folder / f"{split}-{part:05d}-of-{count:05d}.parquet", images)
    with pytest.raises(DataError, match=r"has the splits test, train: name one, such as test-\*.parquet"):
        find_items(folder)
    items = find_items(folder / "train-*.parquet", Columns(label="fine_label"))
    assert [(item.row, item.classes) for item in items] == [(n, (str(n),)) for _ in range(2) for n in range(4)]
    make_shards(items, tmp_path / "a", shard_size=3, seed=0, workers=1)
    samples = [sample for shard in list_shards(str(tmp_path / "a")) for sample in read_shard(shard)]
    found = {(s.files["png"], s.files["cls"].decode()) for s in samples}
    assert found == {(encode(noise(10 * part + n)), str(n)) for part in range(2) for n in range(4)}


def test_paths_in_a_parquet_file(pictures: Path) -> None:
    write_rows(
        pictures / "t.parquet", [{"file_name": "ant/0.jpg", "text": "a"}, {"file_name": "cat/1.jpg", "text": "b"}]
    )
    found = [(item.image, item.captions) for item in find_items(pictures / "t.parquet")]
    assert found == [(pictures / "ant/0.jpg", ("a",)), (pictures / "cat/1.jpg", ("b",))]


def test_a_parquet_file_that_cannot_be_is_one_line(rows: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "none.parquet", [{"text": "a"}])
    write_rows(tmp_path / "null.parquet", [{"jpg": encode(noise(0))}, {"jpg": None}])
    rows.write_bytes(rows.read_bytes()[:-50])
    for name, message in (
        ("none", "none.parquet has the columns text: name the one of the images"),
        ("null", "row 1: image is missing, repair the file"),
        ("rows", "cannot be read: "),
    ):
        with pytest.raises(DataError, match=message) as caught:
            make(tmp_path / f"{name}.parquet", tmp_path / name)
        assert "\n" not in str(caught.value)


def test_videos_of_a_folder_become_samples(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(write_video(4))
    (tmp_path / "in" / "a.txt").write_text("a grey ramp")
    make(tmp_path / "in", tmp_path / "a")
    report = check_shards(list_shards(str(tmp_path / "a")), "jpg;mp4", "txt", workers=1)
    assert (report.samples, report.bad, set(report.extensions)) == (1, {}, {"mp4", "txt"})


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF", "WEBP"])
def test_what_is_made_is_read_with_the_default_keys(tmp_path: Path, format: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{format.lower()}").write_bytes(encode(noise(0), format))
    make(tmp_path / "in", tmp_path / "a")
    assert not check_shards(list_shards(str(tmp_path / "a")), DataConfig().image_key, None, workers=1).bad


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\nnone.jpg\n", "1 of 1 images are missing, the first is .*none.jpg"),
        ("picture\na.jpg\n", "has the columns picture: name the one of the images with --image-column$"),
        ("url,text\na,b\n", "has the columns url, text: .*, or fetch what its URLs name with img2dataset"),
        ("image\n", "has no images"),
        ("caption,image\na\n", "1 of 1 images are missing"),
        (f"image,caption\na.jpg,{'x' * 200_000}\n", "cannot be read: field larger than field limit"),
    ],
)
def test_a_table_that_cannot_be_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        make(tmp_path / "t.csv", tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_check_reads_everything_and_names_what_is_wrong(pictures: Path, tmp_path: Path) -> None:
    make(pictures, tmp_path / "a")
    write_shard(
        tmp_path / "a" / "000001.tar", [("good", {"png": encode(noise(0)), "txt": b"t"}), ("bad", {"txt": b"t"})]
    )
    (tmp_path / "a" / "000002.tar").write_bytes(b"?")
    for workers in (1, 2):
        report = check_shards(list_shards(str(tmp_path / "a")), "jpg;png", "txt", workers)
        assert (report.shards, report.samples) == (3, 6)
        assert report.bad == {"image is missing": 1, "shard is damaged": 1}
        assert [sample.key for sample in report.examples] == ["bad", "sample 0"]
        assert [text.rpartition("/")[2] for text in report.wrong_sizes] == [
            "000001.tar has 2 samples, but 3 are noted beside it"
        ]
        lines = list(report.lines())
        assert lines[0] == "3 shards, 6 samples, 2 of them bad"


def test_show_draws_captions_and_images(pictures: Path, tmp_path: Path) -> None:
    make(pictures, tmp_path / "a")
    shards = list_shards(str(tmp_path / "a"))
    assert draw_sheet(shards, "jpg;png", "txt", 5, tmp_path / "sheet.png") == 5
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    lines = list(describe_shards(shards))
    assert [line.rpartition("/")[2] for line in lines[:3]] == [
        "000000.tar: 3 samples",
        "000001.tar: 3 samples",
        "000002.tar: 1 samples",
    ]
    assert ".txt (8 bytes)" in lines[3]
    with pytest.raises(DataError, match="have no sample with an image and a caption"):
        draw_sheet(shards, "gif", "txt", 5, tmp_path / "sheet.png")
