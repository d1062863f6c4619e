"""Test sets read from shards."""

import io
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from w2s.errors import DataError
from w2s.evaluation.dataset import eval_transform, load_eval_set


def png(colour=(200, 10, 30), size=(40, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path, samples):
    """Write samples, each a key and its files by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for extension, data in files.items():
                data = data.encode() if isinstance(data, str) else data
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def load(folder, size=16, how="crop"):
    return load_eval_set(str(folder), size, how=how, image_key="jpg;png", caption_key="txt", class_key="cls")


def test_order_labels_and_names(tmp_path):
    write_shard(tmp_path / "test/000001.tar", [("c", {"png": png((0, 0, 255)), "txt": "sea", "cls": "1\n"})])
    shard = [("a", {"png": png(), "txt": "fire", "cls": "0"}), ("b", {"png": png(), "txt": "rose", "cls": "0"})]
    write_shard(tmp_path / "test/000000.tar", shard)
    (tmp_path / "classnames.txt").write_text("red things\nblue things\n")
    data = load(tmp_path / "test")
    assert data.keys == ["a", "b", "c"]
    assert data.captions == ["fire", "rose", "sea"]
    assert data.labels.tolist() == [0, 0, 1]
    assert data.class_names == ["red things", "blue things"]
    assert data.images.shape == (3, 3, 16, 16) and data.images.dtype == torch.uint8
    assert data.images[2, :, 8, 8].tolist() == [0, 0, 255]


def test_names_beside_the_shards_come_first(tmp_path):
    write_shard(tmp_path / "test/0.tar", [("a", {"png": png(), "cls": "0"})])
    (tmp_path / "classnames.txt").write_text("above")
    (tmp_path / "test/classnames.txt").write_text("beside")
    data = load(tmp_path / "test")
    assert data.class_names == ["beside"]
    assert data.captions == []


def test_prompts_beside_the_names(tmp_path):
    write_shard(tmp_path / "test/0.tar", [("a", {"png": png(), "txt": "fire"})])
    assert load(tmp_path / "test").prompts == []
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of {c}\n")
    assert load(tmp_path / "test").prompts == ["a photo of a {c}.", "art of {c}"]
    (tmp_path / "test/zeroshot_classification_templates.txt").write_text("{c}\na photo\n")
    with pytest.raises(DataError, match=r"templates\.txt: 'a photo' has no \{c\} in the place of the class name"):
        load(tmp_path / "test")


def test_captions_are_the_classes_where_there_are_no_numbers(tmp_path):
    captions = ["dog", "cat", "dog"]
    write_shard(tmp_path / "0.tar", [(str(i), {"png": png(), "txt": text}) for i, text in enumerate(captions)])
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [1, 0, 1]


def test_several_captions_are_no_class(tmp_path):
    write_shard(
        tmp_path / "0.tar", [("a", {"png": png(), "txt": "a dog\na pet\n"}), ("b", {"png": png(), "txt": "cat"})]
    )
    data = load(tmp_path)
    assert data.captions == ["a dog\na pet", "cat"]
    assert data.labels is None


@pytest.mark.parametrize(("how", "peers"), [("crop", "shortest"), ("squash", "squash")])
@pytest.mark.parametrize("size", [(97, 150), (150, 97), (20, 31), (32, 32)])
def test_transform_is_open_clips(size, how, peers):
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    photo = np.stack([rows * 2, columns, 127 + 100 * np.sin(rows / 9) * np.cos(columns / 7)], -1).astype(np.uint8)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    transform = open_clip.image_transform(32, is_train=False, resize_mode=peers, interpolation="bicubic", **plain)
    reference = (255 * transform(Image.fromarray(photo))).round()
    ours = eval_transform(torch.from_numpy(photo).permute(2, 0, 1), 32, how)
    # Pillow and torch round the filter's weights in different places
    assert (ours.int() - reference.int()).abs().max() <= 2


def test_a_set_is_cropped_or_squashed(tmp_path):
    """A picture with a red left and a blue right quarter: a crop of its middle shows neither."""
    picture = np.zeros((20, 40, 3), dtype=np.uint8)
    picture[:, :10, 0] = picture[:, 30:, 2] = 200
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    write_shard(tmp_path / "0.tar", [("a", {"png": stream.getvalue(), "txt": "flag"})])
    cropped, squashed = (load(tmp_path, 20, how).images[0].int() for how in ("crop", "squash"))
    assert cropped.max() == 0
    assert squashed[0, :, :4].min() > 190 and squashed[2, :, -4:].min() > 190 and squashed[:, :, 7:13].max() < 10


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a", {"png": b"nothing", "txt": "x"})], "a: image cannot be decoded"),
        ([("a", {"gif": png(), "txt": "x"})], "a: no image .jpg;png"),
        ([("a", {"png": png(), "cls": "1.5"})], "a.cls is '1.5', not a class number"),
        ([("a", {"png": png(), "cls": "9" * 5000})], "a.cls is '99999999999999999999', not a class number"),
        ([("a", {"png": png(), "txt": b"\xff\xfe"})], "a: caption is not UTF-8, repair"),
        ([("a", {"png": png(), "cls": "0"}), ("b", {"png": png()})], "b has no class number .cls"),
        ([("a", {"png": png()})], "neither class numbers nor captions"),
        ([("a", {"png": png(), "cls": "7"})], "has 2 names but there is a class number 7"),
        ([], "shard is empty"),
    ],
)
def test_bad_sets_are_one_line(tmp_path, samples, message):
    write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_names_and_prompts_are_utf_8(tmp_path, name):
    write_shard(tmp_path / "0.tar", [("a", {"png": png(), "cls": "0"})])
    (tmp_path / "classnames.txt").write_text("one\n")
    (tmp_path / name).write_bytes("caf\xe9 {c}\n".encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text: repair it$"):
        load(tmp_path)


def test_missing_names_and_missing_shards(tmp_path):
    write_shard(tmp_path / "set/0.tar", [("a", {"png": png(), "cls": "0"})])
    with pytest.raises(DataError, match=r"classnames\.txt does not exist: write the classes' names"):
        load(tmp_path / "set")
    with pytest.raises(DataError, match=r"^eval\.shards="):
        load(tmp_path / "nowhere")
