"""Test sets in CLIP_benchmark's layout: what its package says of them, and that both read what is made."""

import io
import json
import shutil
import sys
from importlib import invalidate_caches
from pathlib import Path

import numpy as np
import pytest

from tests.data.shard_files import encode, noise
from w2s.data.making.clip_benchmark import BenchmarkSet, natural
from w2s.data.making.items import find_items
from w2s.data.making.make import make_shards
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.errors import ConfigError, DataError, MissingPackageError
from w2s.evaluation.dataset import load_eval_set


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in the place of CLIP_benchmark's, with two sets."""
    datasets = tmp_path / "site" / "clip_benchmark" / "datasets"
    datasets.mkdir(parents=True)
    (datasets.parent / "__init__.py").touch()
    (datasets / "__init__.py").touch()
    (datasets / "en_classnames.json").write_text(json.dumps({"pets": ["a cat", "a dog"]}))
    templates = {"imagenet1k": ["of {c}"], "cars": ["a {c}"], "pets": ["a pet {c}", "{c}"]}
    (datasets / "en_zeroshot_classification_templates.json").write_text(json.dumps(templates))
    for name in [name for name in sys.modules if name.partition(".")[0] == "clip_benchmark"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "clip_benchmark"]:
        del sys.modules[name]


def pictures(folder: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(index)))
    return folder


def make(source: Path, out: Path, *, shard_size: int = 2, split: str = "test", like: str = "", prompts=()) -> None:
    test_set = BenchmarkSet(split=split, like=like, prompts=prompts)
    make_shards(find_items(source), out, shard_size=shard_size, seed=0, workers=1, test_set=test_set)


def load(out: Path):
    return load_eval_set(str(out / "test"), caption_key="txt", class_key="cls")


def files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_classes_of_a_folder(tmp_path: Path, package: None) -> None:
    source = pictures(tmp_path / "in", "1/a.png", "2/b.png", "2/c.png")
    out = tmp_path / "wds_pets"
    make(source, out, like="vtab/pets")
    texts = {"classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"}
    assert files(out) == texts | {"test/0.tar", "test/1.tar", "test/sizes.json", "test/make.json"}
    assert (out / "test/nshards.txt").read_text() == "2\n"
    data = load(out)
    assert sorted(data.labels.tolist()) == [0, 1, 1]
    assert (data.class_names, data.prompts) == (["a cat", "a dog"], ["a pet {c}", "{c}"])
    copy = shutil.copytree(out, tmp_path / "copy")
    with pytest.raises(DataError, match="has other classes than this split"):
        make(pictures(tmp_path / "other", "x/d.png", "y/e.png"), copy, split="train")
    make(pictures(tmp_path / "more", "1/d.png", "2/e.png"), out, split="train", like="pets")
    assert "train/0.tar" in files(out)


def test_names_that_clip_benchmark_does_not_list_are_the_folders(package: None) -> None:
    cars = BenchmarkSet(split="test", like="cars")
    assert cars.class_names(["Audi_A4", "BMW/M3"]) == ["Audi A4", "BMW M3"]
    assert cars.find_prompts() == ["a {c}"]
    assert BenchmarkSet(split="test", like="wds/imagenet-a").find_prompts() == ["of {c}"]
    with pytest.raises(ConfigError, match=r"^--like vtab/petz is not a set of CLIP_benchmark: did you mean pets\?"):
        BenchmarkSet(split="test", like="vtab/petz").find_prompts()
    assert BenchmarkSet(split="test").class_names(["Audi_A4"]) == ["Audi_A4"]
    with pytest.raises(DataError, match="--like pets has 2 classes, the source has 1: compare them"):
        BenchmarkSet(split="test", like="pets").class_names(["a"])


def test_imagenets_numbers_have_open_clips_names() -> None:
    assert BenchmarkSet(split="test").class_names(["n01443537", "n01440764"]) == ["goldfish", "tench"]
    with pytest.raises(DataError, match="n00000001 is none of ImageNet's 1,000 classes"):
        BenchmarkSet(split="test").class_names(["n00000001"])


def test_numbers_of_classes_are_in_order(tmp_path: Path) -> None:
    assert sorted(["10", "9", "b2", "b10"], key=natural) == ["9", "10", "b2", "b10"]
    make(pictures(tmp_path / "in", "10/a.png", "9/b.png"), tmp_path / "out", prompts=["{c}"])
    assert load(tmp_path / "out").class_names == ["9", "10"]


def test_several_captions_of_a_tables_images(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", "a.png", "b.png")
    (source / "t.csv").write_text("image,caption\na.png,a dog\nb.png,a cat\na.png,a pet\n")
    make(source / "t.csv", tmp_path / "out")
    assert (tmp_path / "out/dataset_type.txt").read_text() == "retrieval\n"
    assert not (tmp_path / "out/classnames.txt").exists()
    assert sorted(load(tmp_path / "out").captions) == ["a cat", "a dog\na pet"]


def test_several_classes_of_a_tables_images(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", "a.png", "b.png")
    (source / "t.csv").write_text("image,class\na.png,dog\nb.png,cat\na.png,bike\n")
    make(source / "t.csv", tmp_path / "out", prompts=["a photo of a {c}."])
    assert (tmp_path / "out/dataset_type.txt").read_text() == "multilabel\n"
    data = load(tmp_path / "out")
    assert data.class_names == ["bike", "cat", "dog"]
    assert sorted(data.labels.tolist()) == [[False, True, False], [True, False, True]]
    (shard,) = list_shards(str(tmp_path / "out/test"))
    assert np.load(io.BytesIO(next(read_shard(shard)).files["npy"])).dtype == np.int64


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--split val: use test or train"):
        BenchmarkSet(split="val")
    with pytest.raises(ConfigError, match=r"^--prompt 'a photo' has no \{c\}"):
        BenchmarkSet(split="test", prompts=["a photo"]).find_prompts()
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(MissingPackageError, match=r"^--like pets takes names and prompts from CLIP_benchmark"):
        BenchmarkSet(split="test", like="pets").find_prompts()
