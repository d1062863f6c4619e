"""Headers that lie."""

import io
import itertools
import tarfile
from pathlib import Path

import pytest

from tests.data.shard_files import write_shard, write_shards
from w2s.data.making.shard_report import describe_shards
from w2s.data.shards.containers import read_shard
from w2s.data.shards.sizes import index_shards
from w2s.errors import DataError


def with_size(data: bytes, place: int, size: int, kind: bytes | None = None) -> bytes:
    """An archive in which the header at byte `place` says another size, and another kind of member if wanted."""
    header = bytearray(data[place : place + 512])
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    if kind is not None:
        header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shards(tmp_path, [4]) / "000000.tar"


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40), 2**40, 2**62])
@pytest.mark.parametrize("kind", [None, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("number", [0, 2])
def test_a_size_that_cannot_be_ends_a_shard(shard: Path, size: int, kind: bytes | None, number: int) -> None:
    """Some of these Python's tarfile reads for ever."""
    places = [0, *(sample.end for sample in read_shard(str(shard)))]
    shard.write_bytes(with_size(shard.read_bytes(), places[number], size, kind))
    for wanted in (None, ()):
        samples = list(itertools.islice(read_shard(str(shard), wanted=wanted), 9))
        # A sample is whole when the next one begins: where that cannot, it is lost too.
        whole = number if (kind, size) == (None, 2**40) else max(0, number - 1)
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
