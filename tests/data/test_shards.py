from pathlib import Path

import pytest

from tests.data.shard_files import good_sample, write_shard, write_shards
from w2s.data.shards import list_shards
from w2s.data.tar import check_shard, read_shard
from w2s.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "a", [2, 3, 1])


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{000000..000002}.tar", "/{000001,000000,000002}.tar"])
def test_a_folder_a_glob_and_braces_give_the_same_sorted_list(folder: Path, pattern: str) -> None:
    assert names(list_shards(f"{folder}{pattern}")) == ["000000.tar", "000001.tar", "000002.tar"]


def test_sources_are_joined(folder: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "b", [1])
    shards = list_shards(f"{other} :: {folder}/{{000000..000001}}.tar")
    assert shards == [f"{folder}/000000.tar", f"{folder}/000001.tar", f"{other}/000000.tar"]


def test_the_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(list_shards("~/a")) == 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "names no shards"),
        ("a::", "names no shards"),
        ("nowhere", "nowhere does not exist"),
        ("empty", "no .tar file is there"),
        ("a/*.tgz", "no .tar file is there"),
        ("a/{000000..000004}.tar", r"2 of the 5 shards of .* are missing, the first is .*000003.tar"),
        ("a/{000000..", "braces"),
    ],
)
def test_what_is_not_there_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        list_shards(pattern, "data.train")
    assert "\n" not in str(caught.value)
    assert "data.train" in str(caught.value)


def test_a_shard_is_read_in_order(folder: Path) -> None:
    samples = list(read_shard(str(folder / "000001.tar")))
    assert [sample.key for sample in samples] == ["01-000", "01-001", "01-002"]
    assert samples[1].files == good_sample(1001)


def test_a_cut_shard_gives_its_whole_samples_and_then_says_so(folder: Path) -> None:
    path = folder / "000001.tar"
    whole = list(read_shard(str(path)))
    blocks_of_a_sample = sum(512 + -(-len(data) // 512) * 512 for data in whole[0].files.values())
    path.write_bytes(path.read_bytes()[: 2 * blocks_of_a_sample + 600])
    samples = list(read_shard(str(path)))
    # The second sample is known to be whole by the header of the third.
    assert [sample.damage for sample in samples] == ["", "", "shard is damaged"]
    assert samples[:2] == whole[:2]


def test_an_empty_and_a_missing_shard_are_damage(tmp_path: Path) -> None:
    write_shard(tmp_path / "empty.tar", [])
    assert [s.damage for s in read_shard(str(tmp_path / "empty.tar"))] == ["shard is empty"]
    assert [s.damage for s in read_shard(str(tmp_path / "gone.tar"))] == ["shard is gone"]


def test_needed_files_are_checked(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x", {"json": b"{}"}), ("y", {"png": b"", "cls": b"1"})])
    check_shard(f"{tmp_path}/a.tar", "jpg;png", None)
    with pytest.raises(DataError, match=r"sample y of .*a.tar has no caption '.txt', only .cls, .json, .png: set data"):
        check_shard(f"{tmp_path}/a.tar", "jpg;png", "txt")
    with pytest.raises(DataError, match=r"a.tar has no image '.jpg', only .cls, .json, .png: set data.image_key"):
        check_shard(f"{tmp_path}/a.tar", "jpg", None)
    write_shard(tmp_path / "b.tar", [])
    with pytest.raises(DataError, match=r"shard is empty: replace or remove .*b.tar"):
        check_shard(f"{tmp_path}/b.tar", "jpg", None)
