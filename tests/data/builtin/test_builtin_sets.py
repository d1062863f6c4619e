"""Building a data set below the cache: whole or absent, once, and again only on demand."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from w2s.config.sections import DataConfig
from w2s.data.builtin import builtin_sets
from w2s.data.builtin.builtin_sets import ensure_builtin, without_left_out
from w2s.errors import ConfigError, DataError

Use = Callable[[Callable[[Path], None]], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Put a function in the place of what builds `emoji`."""
    return lambda build: monkeypatch.setitem(builtin_sets.BUILTINS, "emoji", ("set-1", build))


def whole(folder: Path) -> None:
    (folder / "whole").touch()


def without_stamps(folder: Path) -> None:
    (folder / "sources.json").write_text(json.dumps({"tuxpaint": {"left_out": "no network"}}))


def never(folder: Path) -> None:
    pytest.fail("built again")


def data(cache: Path) -> DataConfig:
    return DataConfig(builtin="emoji", cache=str(cache))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_built_once(tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    use(whole)
    assert ensure_builtin(data(Path("~/cache"))) == tmp_path / "cache" / "set-1"
    use(never)
    for renew in (False, True):
        ensure_builtin(data(tmp_path / "cache"), renew)
    assert names(tmp_path / "cache") == ["set-1"]
    assert names(tmp_path / "cache" / "set-1") == ["whole"]


def test_one_that_lacks_a_source_says_so_each_time_and_is_built_again_on_demand(
    tmp_path: Path, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    use(without_stamps)
    ensure_builtin(data(tmp_path))
    use(never)
    ensure_builtin(data(tmp_path))
    line = f"{tmp_path / 'set-1'} is without Tux Paint stamps (no network): it is not the full data set"
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [line] * 2
    caplog.clear()
    use(whole)
    ensure_builtin(data(tmp_path), renew=True)
    assert names(tmp_path / "set-1") == ["whole"]
    assert names(tmp_path) == ["set-1"]
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, use: Use) -> None:
    use(never)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write data.cache=.*file/cache .*: choose another folder") as caught:
        ensure_builtin(data(tmp_path / "file" / "cache"))
    assert "\n" not in str(caught.value)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, use: Use) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("No space left on device")

    use(fail)
    with pytest.raises(DataError, match="No space left on device"):
        ensure_builtin(data(tmp_path))
    assert names(tmp_path) == []


def test_another_rank_may_be_faster(tmp_path: Path, use: Use) -> None:
    use(lambda folder: (tmp_path / "set-1" / "theirs").mkdir(parents=True))
    ensure_builtin(data(tmp_path))
    assert names(tmp_path) == ["set-1"]
    assert names(tmp_path / "set-1") == ["theirs"]


def test_data_that_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data=shards is not built from packages: there are emoji, showcase$"):
        ensure_builtin(DataConfig(name="shards", builtin="none", cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("build", [whole, without_stamps])
def test_a_test_set_goes_only_with_a_source_that_was_left_out(
    tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch, build: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    use(build)
    cached = data(Path("~/cache"))
    (ensure_builtin(cached) / "openmoji").mkdir()
    sets = {"openmoji": "~/cache/set-1/openmoji", "stamps": "~/cache/set-1/stamps", "own": "elsewhere/{0..3}.tar"}
    left = without_left_out(cached, sets)
    assert left == ({name: sets[name] for name in ("openmoji", "own")} if build is without_stamps else sets)
    assert without_left_out(DataConfig(), sets) == sets
