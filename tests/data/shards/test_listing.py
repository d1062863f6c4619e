import gzip
import re
from pathlib import Path

import fsspec
import pytest

from tests.data.shard_files import write_shards
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards
from w2s.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "a", [2, 3, 1])


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{000000..000002}.tar", "/{000001,000000,000002}.tar"])
def test_a_folder_a_glob_and_braces_give_the_same_sorted_list(folder: Path, pattern: str) -> None:
    assert names(list_shards(f"{folder}{pattern}")) == ["000000.tar", "000001.tar", "000002.tar"]


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


def test_colons_semicolons_commas_and_lists_join_sources(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "b", [1])
    shards = [f"{tmp_path}/a/000000.tar", f"{tmp_path}/a/000001.tar", f"{tmp_path}/b/000000.tar"]
    assert list_shards(f"{tmp_path}/b :: {folder}/{{000000..000001}}.tar") == shards
    assert list_shards(f"{tmp_path}/b ; {folder}/{{000000,000001}}.tar") == shards
    assert list_shards(f"{folder}/{{000000,000001}}.tar,{tmp_path}/b") == shards
    (tmp_path / "list.txt").write_text(f"{folder}/{{000000..000001}}.tar\n\n{tmp_path}/b\n")
    assert list_shards(f"{tmp_path}/list.txt") == list_shards(f"file://{tmp_path}/list.txt") == shards
    with pytest.raises(DataError, match=r"data.train=.*none.txt cannot be read"):
        list_shards(f"{tmp_path}/none.txt")


def test_urls_are_expanded_and_globbed(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for index in range(3):
        memory.pipe_file(f"/urls/{index:06d}.tar", (folder / f"{index:06d}.tar").read_bytes())
    expected = [f"memory:///urls/{index:06d}.tar" for index in range(3)]
    assert list_shards("memory://urls/") == list_shards("memory://urls/*.tar") == expected
    # A brace pattern is taken as it stands: nobody asks a server for 160,000 names.
    assert len(list_shards("memory://urls/{000000..000009}.tar")) == 10
    assert list_shards(f"file://{folder}/{{000000..000002}}.tar") == list_shards(str(folder))
    for url, path in zip(expected, sorted(folder.iterdir()), strict=True):
        assert [sample.files for sample in read_shard(url)] == [sample.files for sample in read_shard(str(path))]
    with pytest.raises(DataError, match="memory://nothing/ has no shards"):
        list_shards("memory://nothing/")
    memory.rm("/urls", recursive=True)


def test_what_fsspec_cannot_open_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data.train=what://a/\*.tar cannot be opened: "):
        list_shards("what://a/*.tar")

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
