"""The showcase from a few made-up drawings: who is in which folder, and what is said of sources that are missing."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from w2s.config.checks import check
from w2s.config.load import load
from w2s.config.sections import DataConfig
from w2s.data.builtin import showcase
from w2s.data.builtin.builtin_sets import ensure_builtin
from w2s.data.builtin.drawings import Drawing
from w2s.data.builtin.packages import Package, SourceMissing
from w2s.data.builtin.showcase import NAME, SOURCES
from w2s.data.builtin.splits import is_held_out
from w2s.data.samples.decode import decode_image
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.data.shards.raw_sample import RawSample

EMOJI = [f"thing {index}" for index in range(60)]
HELD_OUT = {name for name in EMOJI if is_held_out(name)}


def drawings(source: str, names: list[str]) -> Iterator[Drawing]:
    """One drawing a name, and one of which there is nothing to see."""
    for index, name in enumerate(names):
        noise = np.random.default_rng([*source.encode(), index]).integers(0, 255, (30, 20, 3), np.uint8)
        yield Drawing(f"folder/{index}.x", name, Image.fromarray(noise).resize((300, 200)))
    yield Drawing("blank", "nothing", Image.new("RGBA", (30, 30), (0, 0, 0, 0)))


Fetch = Callable[[Path], Package]


def names_of(source: str) -> list[str]:
    if source == "openclipart":
        return [*(f"old {name}, {name}" for name in EMOJI[:20]), *["house"] * 40]
    return ["A cat.", "A cat.", "A dog."] if source == "tuxpaint" else EMOJI


def missing(_: Path) -> Package:
    raise SourceMissing("no network")


def use(monkeypatch: pytest.MonkeyPatch, empty: str = "", **instead: Fetch) -> None:
    """Replace the sources, and do without the packages that real ones need."""
    monkeypatch.setattr(showcase, "check_installed", lambda builtin: None)
    monkeypatch.setattr(showcase, "version", lambda package: "1.0")
    for name, source in SOURCES.items():
        fetch = instead.get(name, lambda _, name=name: Package(Path(name), f"{name}-package 1.0"))
        names = [] if name == empty else names_of(name)
        made_up = lambda _, name=name, names=names: drawings(name, names)  # noqa: E731
        monkeypatch.setitem(SOURCES, name, showcase.Source(source.title, source.licence, fetch, made_up))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        return ensure_builtin(DataConfig(builtin="showcase", cache=str(tmp_path_factory.mktemp("cache"))))


def samples(folder: Path) -> list[RawSample]:
    return [sample for shard in list_shards(str(folder)) for sample in read_shard(shard)]


def texts(folder: Path) -> set[str]:
    return {sample.files["txt"].decode() for sample in samples(folder)}


def test_folders_hold_labelled_pictures(built: Path) -> None:
    folders = ("openmoji", "openmoji_unseen", "train", "tune", "tuxpaint")
    assert sorted(path.name for path in built.iterdir()) == ["LICENSES.txt", *folders[:2], "sources.json", *folders[2:]]
    for name in folders:
        members = samples(built / name)
        classes = (built / name / "classnames.txt").read_text().splitlines()
        assert classes == sorted(texts(built / name))
        assert {classes[int(sample.files["cls"])] == sample.files["txt"].decode() for sample in members} == {True}
        sizes = json.loads((built / name / "sizes.json").read_text())
        assert sum(sizes.values()) == len(members) == len({sample.key for sample in members})
        for sample in members[:2]:
            pixels = decode_image(sample.files["png"])
            assert pixels.shape == (128, 128, 3)
            assert (pixels[0] == 255).all()


def test_training_sees_no_name_that_is_held_out_and_no_picture_that_is_put_aside(built: Path) -> None:
    train, tune = texts(built / "train"), texts(built / "tune")
    words = {word for text in train | tune for word in text.removeprefix("old ").split(", ")}
    assert words == {"house"} | set(EMOJI) - HELD_OUT
    assert tune
    assert tune <= train
    pictures = [{sample.files["png"] for sample in samples(built / name)} for name in ("train", "tune")]
    assert not pictures[0] & pictures[1]
    assert texts(built / "openmoji") == set(EMOJI)
    assert texts(built / "openmoji_unseen") == HELD_OUT


def test_the_account_says_what_came_from_where(built: Path) -> None:
    account = json.loads((built / "sources.json").read_text())
    assert account["tuxpaint"] == {
        "package": "tuxpaint-package 1.0",
        "licence": "GPL-2",
        "pairs": {"tuxpaint": 3},
    }
    assert account["openmoji"]["pairs"] == {"openmoji": 60, "openmoji_unseen": len(HELD_OUT)}
    for name in ("train", "tune"):
        assert sum(entry["pairs"].get(name, 0) for entry in account.values()) == len(samples(built / name))
    licences = (built / "LICENSES.txt").read_text()
    assert "Twemoji (twemoji-package 1.0): CC-BY 4.0" in licences
    assert "Names of the emoji (emoji 1.0): BSD" in licences


def test_a_source_that_is_missing_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, tuxpaint=missing, noto=missing, empty="fluent")
    folder = ensure_builtin(DataConfig(builtin="showcase", cache=str(tmp_path)))
    assert folder == tmp_path / NAME
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    reasons = {
        "Noto Color Emoji": "no network",
        "Fluent Emoji": "fluent-package 1.0 has no pictures where they used to be",
        "Tux Paint stamps": "no network",
    }
    assert lines == [
        f"{folder} is without {title} ({reason}): it is not the full data set" for title, reason in reasons.items()
    ]
    account = json.loads((folder / "sources.json").read_text())
    assert account["noto"] == account["tuxpaint"] == {"left_out": "no network"}
    assert not (folder / "tuxpaint").exists()
    assert "Noto" not in (folder / "LICENSES.txt").read_text()
    assert not any(sample.key.startswith("noto-") for sample in samples(folder / "train"))


def test_the_configuration_names_the_folders(built: Path) -> None:
    cache = f"data.cache={built.parent}"
    for stage in ("mim", "clip", "eval"):
        config = load(stage, ["data=showcase", cache, "hardware=cpu"])
        check(config, 1, 1)
        shards = [config.data.train, config.eval.knn_shards, *config.eval.by_name.values()]
        assert all(list_shards(folder) for folder in shards)
        assert ("tuxpaint" in config.eval.by_name) == (stage == "eval")
