"""Test sets read from shards."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.web import serve
from w2s.errors import DataError
from w2s.evaluation.dataset import EvalSet, load_eval_set


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


def load(folder, **ranks) -> EvalSet:
    return load_eval_set(str(folder), caption_key="txt", class_key="cls", **ranks)


def npy(*marks):
    stream = io.BytesIO()
    np.save(stream, np.array(marks))
    return stream.getvalue()


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
    assert data.shards == [str(tmp_path / f"test/00000{index}.tar") for index in range(2)]
    assert data.locations[:, 0].tolist() == [0, 0, 1] and len(data) == 3
    with tarfile.open(data.shards[0]) as tar:
        assert data.locations[:2, 1].tolist() == [0, tar.getmember("b.png").offset]


def test_several_classes_an_image(tmp_path):
    shard = [("a", {"png": png(), "npy": npy(1, 0, 1)}), ("b", {"png": png(), "npy": npy(0, 0, 1)})]
    write_shard(tmp_path / "test/0.tar", shard)
    (tmp_path / "classnames.txt").write_text("dog\ncat\nbike\n")
    data = load(tmp_path / "test")
    assert data.labels.tolist() == [[True, False, True], [False, False, True]]
    assert data.class_names == ["dog", "cat", "bike"]
    (tmp_path / "classnames.txt").write_text("dog\ncat\n")
    with pytest.raises(DataError, match=r"has 2 names but there is an image with 3 classes: repair the test set$"):
        load(tmp_path / "test")


def test_ranks_read_shards_of_their_own_and_know_all(tmp_path, monkeypatch):
    for index in range(3):
        write_shard(tmp_path / f"{index}.tar", [(f"{index}", {"png": png(), "txt": f"caption {index}"})])
    parts = []
    for rank in range(2):  # what each rank has read, without the others'
        with pytest.raises(KeyError):
            load(tmp_path, rank=rank, size=2, gather=lambda local: parts.append(local) or [local])
    assert [len(part) for part in parts] == [2, 1]
    assert load(tmp_path, rank=1, size=2, gather=lambda local: parts).captions == load(tmp_path).captions


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


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a", {"png": png(), "cls": "1.5"})], "a.cls is '1.5', not a class number"),
        ([("a", {"png": png(), "cls": "9" * 5000})], "a.cls is '99999999999999999999', not a class number"),
        ([("a", {"png": png(), "txt": b"\xff\xfe"})], "a: caption is not UTF-8, repair"),
        ([("a", {"png": png(), "cls": "0"}), ("b", {"png": png()})], "b has no class number .cls"),
        ([("a", {"png": png(), "npy": b"\x93NUMPY"})], "a.npy is not an array with a number for each class"),
        ([("a", {"png": png(), "npy": npy("x")})], "a.npy is not an array with a number for each class"),
        ([("a", {"png": png()})], "neither class numbers nor captions"),
        ([("a", {"png": png(), "cls": "7"})], "has 2 names but there is a class number 7"),
        ([], "has no samples: its shards are empty"),
    ],
)
def test_bad_sets_are_one_line(tmp_path, samples, message):
    write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError) as error:
        load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_set_on_a_server_is_the_same_as_on_the_disk(tmp_path):
    write_shard(tmp_path / "set/test/0.tar", [("a", {"png": png(), "cls": "1"})])
    (tmp_path / "set/classnames.txt").write_text("one\ntwo\n")
    (tmp_path / "set/test/zeroshot_classification_templates.txt").write_text("a {c}\n")
    with serve(tmp_path) as (url, _):
        theirs = load(f"{url}/set/test/0.tar")
    for ours in (load(tmp_path / "set/test"), load(f"file://{tmp_path}/set/test/0.tar")):
        assert (ours.class_names, ours.prompts) == (theirs.class_names, theirs.prompts) == (["one", "two"], ["a {c}"])
        assert ours.labels.tolist() == theirs.labels.tolist() == [1]


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
