import json
from pathlib import Path

import pytest

from tests.data.shard_files import encode, noise
from w2s.data.making.class_names import named_classes
from w2s.data.making.clip_benchmark import BenchmarkSet
from w2s.data.making.items import find_items
from w2s.data.making.make import make_shards
from w2s.errors import DataError
from w2s.evaluation.dataset import load_eval_set

LABELS = ["n01440764", "n01443537"]
NAMES = ["tench", "goldfish, Carassius auratus"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", json.dumps(dict(zip(LABELS, NAMES, strict=True)))),
        ("imagenet_class_index.json", json.dumps({str(n): [LABELS[n], NAMES[n]] for n in range(2)})),
        ("map.csv", 'synset,name\nn01443537,"goldfish, Carassius auratus"\nn01440764,tench,more\n'),
        ("map.tsv", "n01440764\ttench\nn01443537\tgoldfish, Carassius auratus\n"),
        ("LOC_synset_mapping.txt", "n01440764 tench\nn01443537 goldfish, Carassius auratus\n\nn0 other\n"),
        ("words.txt", "\ufeffn01440764\ttench\r\nn01443537\tgoldfish, Carassius auratus\r\n"),
    ],
)
def test_labels_are_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert named_classes(LABELS, tmp_path / name) == ({LABELS[0]: 0, LABELS[1]: 1}, NAMES)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.json", '["a cat", "a dog", "an owl"]'),
        ("names.txt", "a cat\na dog\nan owl\n"),
    ],
)
def test_names_without_labels_are_by_number(tmp_path: Path, name: str, text: str) -> None:
    """All of them are classes, so that a split without some of them has the same numbers."""
    (tmp_path / name).write_text(text)
    assert named_classes(["0", "2"], tmp_path / name) == ({"0": 0, "2": 2}, ["a cat", "a dog", "an owl"])


def test_numbers_of_names(tmp_path: Path) -> None:
    (tmp_path / "class_to_idx.json").write_text('{"cat": 1, "ant": 0}')
    assert named_classes(["0", "1"], tmp_path / "class_to_idx.json") == ({"0": 0, "1": 1}, ["ant", "cat"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"n01440764": "tench"}', "has no name for 1 of 2 classes, such as n01443537"),
        ("a.txt", "tench\n", "has no name for 2 of 2 classes, such as n01440764"),
        ("a.json", "3", "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"x": []}', "cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"^--class-names .*{message}") as caught:
        named_classes(LABELS, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_there_has_to_be_something_to_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(noise(0)))
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(DataError, match="has nothing to name: the images have no classes, see --class-column"):
        items = find_items(tmp_path / "in")
        make_shards(items, tmp_path / "a", shard_size=9, seed=0, workers=1, class_names=tmp_path / "names.txt")


@pytest.mark.parametrize("test_set", [None, BenchmarkSet(split="test", prompts=["a {c}"])])
def test_shards_have_the_names(tmp_path: Path, test_set: BenchmarkSet | None) -> None:
    for index, label in enumerate(["2", "0"]):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "a.png").write_bytes(encode(noise(index)))
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    items = find_items(tmp_path / "in")
    make_shards(items, tmp_path / "a", shard_size=9, seed=0, workers=1, test_set=test_set, class_names=names)
    data = load_eval_set(str(tmp_path / "a" / ("test" if test_set else "")), caption_key="txt", class_key="cls")
    assert sorted(data.labels.tolist()) == [0, 2] and data.class_names == ["cat", "dog", "owl"]
