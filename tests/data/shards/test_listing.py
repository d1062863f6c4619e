import gzip
import re
from pathlib import Path

import fsspec
import pytest

from tests.data.shard_files import good_sample, write_shard, write_shards
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.data.stream.sources import check_source
from w2s.errors import ConfigError, DataError


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
        ("empty", "no .tar or .parquet file is there"),
        ("a/*.tgz", "no .tar or .parquet file is there"),
        ("a/{000000..000004}.tar", r"2 of the 5 shards of .* are missing, the first is .*000003.tar"),
        ("a/{000000..", "braces"),
        (
            "a/{000000..99999999999}.tar",
            r"a/{000000..99999999999}.tar stands for more than 2,000,000 shards: name fewer",
        ),
        ("a/{0..9999}/{0..9999}.tar", "stands for more than 2,000,000 shards"),
        ("a/{x" + "{a,b}" * 40 + ",c}.tar", "stands for more than 2,000,000 shards"),
        (f"a/{{0..{'9' * 5000}}}.tar", "braces"),
        ("blank.txt", "blank.txt has no shards: it has no line with one"),
        ("binary.txt", "binary.txt cannot be read: .*can't decode"),
    ],
)
def test_what_is_not_there_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    (folder.parent / "blank.txt").write_text("\n\n")
    (folder.parent / "binary.txt").write_bytes(b"\xff\xfe")
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


def test_a_missing_shard_is_damage_and_an_empty_one_is_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "empty.tar", [])
    assert list(read_shard(str(tmp_path / "empty.tar"))) == []
    assert [s.damage for s in read_shard(str(tmp_path / "gone.tar"))] == ["shard is gone"]


def test_needed_files_are_checked(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [("x", {"json": b"{}"}), ("y", {"png": b"", "cls": b"1"})])
    check_source([f"{tmp_path}/a.tar"], "jpg;png", None)
    with pytest.raises(DataError, match=r"sample y of .*a.tar has no caption '.txt', only .cls, .json, .png: set data"):
        check_source([f"{tmp_path}/a.tar"], "jpg;png", "txt")
    with pytest.raises(DataError, match=r"a.tar has no image '.jpg', only .cls, .json, .png: set data.image_key"):
        check_source([f"{tmp_path}/a.tar"], "jpg", None)
    write_shard(tmp_path / "b.tar", [])
    with pytest.raises(DataError, match=r"b.tar and the other shards of its source have no samples"):
        check_source([f"{tmp_path}/b.tar"] * 9, "jpg", None)
    check_source([*[f"{tmp_path}/b.tar"] * 9, f"{tmp_path}/a.tar"], "png", None)
    with pytest.raises(DataError, match=r"a.tar has no image '.jpg'"):
        check_source([f"{tmp_path}/b.tar", f"{tmp_path}/a.tar"], "jpg", None)


@pytest.mark.parametrize(("suffix", "command"), [("tar.gz", "gunzip"), ("tgz", "gunzip"), ("tar.zst", "zstd -d --rm")])
def test_compressed_shards_are_refused_with_what_unpacks_them(tmp_path: Path, suffix: str, command: str) -> None:
    write_shards(tmp_path / "a", [2])
    packed = tmp_path / "b" / f"0.{suffix}"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((tmp_path / "a/000000.tar").read_bytes()))
    message = re.escape(f"{packed} is compressed") + rf".*unpack with {command} \*.{suffix} and name the .tar files"
    for named in (packed, packed.parent, f"{packed.parent}/*", f"file://{packed}"):
        with pytest.raises(DataError, match=message) as caught:
            list_shards(str(named))
        assert "\n" not in str(caught.value)
    if command == "gunzip":
        assert len(list(read_shard(f"pipe:gunzip -c {packed}"))) == 2
        assert list_shards(f"pipe:gunzip -c {packed}", allow_pipe=True)


def test_a_compressed_shard_under_another_name(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    shard = tmp_path / "000000.tar"
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert [sample.damage for sample in read_shard(str(shard))] == ["shard is compressed"]
    with pytest.raises(DataError, match=rf"is compressed.*: mv {shard} {shard}.gz; gunzip {shard}.gz"):
        check_source([str(shard)], "png", None)


def test_semicolons_commas_and_lists_join_too(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "b", [1])
    shards = [f"{tmp_path}/a/000000.tar", f"{tmp_path}/a/000001.tar", f"{tmp_path}/b/000000.tar"]
    assert list_shards(f"{tmp_path}/b ; {folder}/{{000000,000001}}.tar") == shards
    assert list_shards(f"{folder}/{{000000,000001}}.tar,{tmp_path}/b") == shards
    (tmp_path / "list.txt").write_text(f"{folder}/{{000000..000001}}.tar\n\n{tmp_path}/b\n")
    assert list_shards(f"{tmp_path}/list.txt") == list_shards(f"file://{tmp_path}/list.txt") == shards
    with pytest.raises(DataError, match=r"data.train=.*none.txt cannot be read"):
        list_shards(f"{tmp_path}/none.txt")


def test_urls_are_expanded_and_globbed(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe_file(f"/urls/{number:06d}.tar", (folder / f"{number:06d}.tar").read_bytes())
    expected = [f"memory:///urls/{number:06d}.tar" for number in range(3)]
    assert list_shards("memory://urls/") == list_shards("memory://urls/*.tar") == expected
    # A brace pattern is taken as it stands: nobody asks a server for 160,000 names.
    assert len(list_shards("memory://urls/{000000..000009}.tar")) == 10
    assert list_shards(f"file://{folder}/{{000000..000002}}.tar") == list_shards(str(folder))
    for url, path in zip(expected, sorted(folder.iterdir()), strict=True):
        assert [sample.files for sample in read_shard(url)] == [sample.files for sample in read_shard(str(path))]
    with pytest.raises(DataError, match="memory://nothing/ has no shards"):
        list_shards("memory://nothing/")
    memory.rm("/urls", recursive=True)


def test_an_unknown_kind_of_url_is_one_line() -> None:
    with pytest.raises(DataError, match=r"data.train=what://a/\*.tar cannot be opened: "):
        list_shards("what://a/*.tar")


def test_a_driver_without_its_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str) -> None:
        raise OSError("Unable to load libhdfs\ndlopen(libhdfs.so) failed")

    monkeypatch.setattr(fsspec, "url_to_fs", fail)
    with pytest.raises(DataError, match=r"data.train=hdfs://a/b.tar cannot be opened: Unable to load libhdfs$"):
        list_shards("hdfs://a/b.tar")


def test_a_shell_command_needs_permission(folder: Path) -> None:
    command = f"pipe:cat {folder}/{{000000..000001}}.tar"
    with pytest.raises(ConfigError, match=r"runs a shell command: set data.allow_pipe=true if you trust it"):
        list_shards(command)
    shards = list_shards(command, allow_pipe=True)
    assert shards == [f"pipe:cat {folder}/000000.tar", f"pipe:cat {folder}/000001.tar"]
    whole = list(read_shard(shards[1]))
    assert [sample.files for sample in whole] == [sample.files for sample in read_shard(f"{folder}/000001.tar")]
    assert [sample.key for sample in read_shard(shards[1], whole[0].end)] == ["01-001", "01-002"]


def test_reading_resumes_at_the_end_of_any_sample(folder: Path, tmp_path: Path) -> None:
    long = "x" * 150  # a name that needs a header of its own
    write_shard(tmp_path / "long.tar", [(f"{n}{long}", {"txt": b"%d" % n}) for n in range(4)])
    for shard in (f"{folder}/000001.tar", str(tmp_path / "long.tar")):
        whole = list(read_shard(shard))
        for number, sample in enumerate(whole):
            assert list(read_shard(shard, sample.end)) == whole[number + 1 :]


def test_only_wanted_files_are_read(folder: Path) -> None:
    samples = list(read_shard(f"{folder}/000001.tar", wanted={"txt"}))
    assert [sorted(sample.files) for sample in samples] == [["txt"]] * 3
    assert len(list(read_shard(f"{folder}/000001.tar", wanted=()))) == 3
