import json
from pathlib import Path

import fsspec
import pytest

from tests.data.shard_files import write_shards
from w2s.data.shards.listing import list_shards
from w2s.data.shards.sizes import Counting, count_samples, index_shards, known_sizes
from w2s.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return list_shards(str(write_shards(tmp_path / "a", [3, 1, 2])))


def test_sizes_come_from_files_beside_the_shards(shards: list[str], tmp_path: Path) -> None:
    index = tmp_path / "index"
    assert count_samples(shards, index) is None
    (tmp_path / "a" / "__len__").write_text("60\n")
    assert count_samples(shards, index) == 60
    for shard in (0, 2):
        (tmp_path / "a" / f"{shard:06d}_stats.json").write_text(json.dumps({"count": 9, "successes": shard + 7}))
    assert known_sizes(shards) == {shards[0]: 7, shards[2]: 9}
    (tmp_path / "a" / "sizes.json").write_text(json.dumps({"000000.tar": 4, "000001.tar": 5, "other.tar": 99}))
    assert known_sizes(shards) == {shards[0]: 4, shards[1]: 5, shards[2]: 9}
    # No run asks for each shard at its start.
    assert count_samples(shards, index) == 60
    assert sum(index_shards(shards, index).values()) == count_samples(shards, index) == 18


def test_what_nobody_has_counted_is_added_up_in_the_background(shards: list[str], tmp_path: Path) -> None:
    index = tmp_path / "index"
    for extra, shard in enumerate(shards):
        Path(shard).with_name(f"00000{extra}_stats.json").write_text(json.dumps({"successes": 10 + extra}))
    counting = Counting({"none": [f"{tmp_path}/nothing.tar"], "laion": shards}, index)
    counting.ended.wait()
    assert counting.news() == ["laion has 33 samples in 3 shards"]
    assert counting.news() == []
    assert count_samples(shards, index) == 33


def test_an_index_counts_once(shards: list[str], tmp_path: Path) -> None:
    index = tmp_path / "index"
    assert index_shards(shards, index) == dict(zip(shards, [3, 1, 2], strict=True))
    Path(shards[0]).unlink()
    assert count_samples(shards, index) == 6
    assert count_samples(shards[1:], index) is None
    with pytest.raises(DataError, match="shard is gone after 0 samples"):
        index_shards(shards, index)


def test_a_broken_sizes_file_is_one_line(shards: list[str], tmp_path: Path) -> None:
    (tmp_path / "a" / "sizes.json").write_text("{")
    with pytest.raises(DataError, match=r"sizes.json is not valid JSON .*: repair or remove it"):
        known_sizes(shards)


@pytest.mark.parametrize("content", ['{"000000.tar": "12"}', '{"000000.tar": null}', '{"000000.tar": -1}'])
def test_a_size_that_is_no_number_is_one_line(shards: list[str], tmp_path: Path, content: str) -> None:
    (tmp_path / "a" / "sizes.json").write_text(content)
    with pytest.raises(DataError, match=r"sizes.json has .* for 000000.tar, no number of samples: repair or remove it"):
        known_sizes(shards)


def test_no_command_is_made_up_to_find_the_size_of_a_pipe(shards: list[str], tmp_path: Path) -> None:
    # Beside `pipe:cat a | tee DIR/b.tar` there is no `pipe:cat a | tee DIR/sizes.json`: that would write such a file.
    piped = f"pipe:cat {shards[0]} | tee {tmp_path}/copy.tar"
    assert count_samples([piped], tmp_path / "index") is None
    assert index_shards([piped], tmp_path / "index") == {piped: 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "copy.tar", "index"]


def test_remote_sizes(shards: list[str], tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/sizes/0.tar", Path(shards[0]).read_bytes())
    assert count_samples(["memory://sizes/0.tar"], tmp_path) is None
    assert index_shards(["memory://sizes/0.tar"], tmp_path) == {"memory://sizes/0.tar": 3}
    memory.pipe_file("/sizes/sizes.json", b'{"0.tar": 8}')
    assert known_sizes(["memory://sizes/0.tar"]) == {"memory://sizes/0.tar": 8}
    memory.rm("/sizes", recursive=True)
