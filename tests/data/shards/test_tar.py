"""The samples of a tar file, cut ones, and headers that lie."""

import io
import itertools
import tarfile
from pathlib import Path

import pytest

from tests.data.shard_files import good_sample, write_shard, write_shards
from w2s.data.making.shard_report import describe_shards
from w2s.data.shards.containers import read_shard
from w2s.data.shards.sizes import index_shards
from w2s.errors import DataError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shards(tmp_path, [4]) / "000000.tar"


def test_a_shard_is_read_in_order_and_from_the_end_of_any_sample(shard: Path, tmp_path: Path) -> None:
    samples = list(read_shard(str(shard)))
    assert [sample.key for sample in samples] == ["00-000", "00-001", "00-002", "00-003"]
    assert samples[1].files == good_sample(1)
    long = "x" * 150  # a name that needs a header of its own
    write_shard(tmp_path / "long.tar", [(f"{n}{long}", {"txt": b"%d" % n}) for n in range(4)])
    for path in (shard, tmp_path / "long.tar"):
        whole = list(read_shard(str(path)))
        for count, sample in enumerate(whole, 1):
            assert list(read_shard(str(path), sample.end)) == whole[count:]


def test_only_wanted_files_are_read(shard: Path) -> None:
    samples = list(read_shard(str(shard), wanted={"txt"}))
    assert [sorted(sample.files) for sample in samples] == [["txt"]] * 4
    assert len(list(read_shard(str(shard), wanted=()))) == 4


def test_a_cut_shard_gives_its_whole_samples_and_then_says_so(shard: Path) -> None:
    whole = list(read_shard(str(shard)))
    shard.write_bytes(shard.read_bytes()[: whole[1].end + 600])
    # The second sample is known to be whole by the header of the third.
    samples = list(read_shard(str(shard)))
    assert [sample.damage for sample in samples] == ["", "", "shard is damaged"]
    assert samples[:2] == whole[:2]


def test_a_broken_header_in_the_middle_is_no_end(shard: Path) -> None:
    """Python's tarfile takes it for the end of the archive: half of the shard would be lost in silence."""
    place = list(read_shard(str(shard)))[2].end
    data = bytearray(shard.read_bytes())
    data[place : place + 512] = b"\x55" * 512
    shard.write_bytes(data)
    assert [sample.damage for sample in read_shard(str(shard))] == ["", "", "shard is damaged"]


def test_a_missing_shard_is_damage_and_an_empty_one_is_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "empty.tar", [])
    assert list(read_shard(str(tmp_path / "empty.tar"))) == []
    assert [s.damage for s in read_shard(str(tmp_path / "gone.tar"))] == ["shard is gone"]


def with_size(data: bytes, place: int, size: int, kind: bytes | None = None) -> bytes:
    """An archive in which the header at byte `place` says another size, and another kind of member if wanted."""
    header = bytearray(data[place : place + 512])
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    if kind is not None:
        header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40), 2**40, 2**62])
@pytest.mark.parametrize("kind", [None, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("sound", [0, 2])
def test_a_size_that_cannot_be_ends_a_shard(shard: Path, size: int, kind: bytes | None, sound: int) -> None:
    """Some of these Python's tarfile reads for ever."""
    places = [0, *(sample.end for sample in read_shard(str(shard)))]
    shard.write_bytes(with_size(shard.read_bytes(), places[sound], size, kind))
    for wanted in (None, ()):
        samples = list(itertools.islice(read_shard(str(shard), wanted=wanted), 9))
        # A sample is whole when the next one begins: where that cannot, it is lost too.
        whole = sound if (kind, size) == (None, 2**40) else max(0, sound - 1)
        assert [sample.damage for sample in samples] == [""] * whole + ["shard is damaged"]
    assert "then shard is damaged" in next(describe_shards([str(shard)]))
    (shard.parent / "sizes.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="shard is damaged after"):
        index_shards([str(shard)], shard.parent / "index")


@pytest.mark.parametrize("size", ["-1024", "99999999999999999999"])
def test_an_extended_header_cannot_say_it_either(tmp_path: Path, size: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.txt", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 4, {"size": size}
            tar.addfile(member, io.BytesIO(b"text"))
    samples = list(itertools.islice(read_shard(str(tmp_path / "a.tar")), 9))
    assert [sample.damage for sample in samples] == ["shard is damaged"]


def test_a_file_too_large_costs_its_sample_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("w2s.data.shards.tar.MAX_FILE", 100)
    write_shard(tmp_path / "a.tar", [(str(n), {"mp4": bytes(size), "txt": b"x"}) for n, size in enumerate([9, 101, 9])])
    damage = [sample.damage for sample in read_shard(str(tmp_path / "a.tar"))]
    assert damage == ["", "file is too large", ""]
    assert not any(sample.damage for sample in read_shard(str(tmp_path / "a.tar"), wanted={"txt"})), "it is not read"
