"""Every kind of bad input, planted: it is counted under its reason, and nothing else is lost or repeated."""

import io
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from tests.data.shard_files import Files, bomb, encode, noise, smooth_photo, write_shard, write_shards
from w2s.config.sections import DataConfig
from w2s.data.samples.sample import SampleSpec
from w2s.data.shards.containers import read_shard
from w2s.data.shards.storage import WAITS
from w2s.data.stream.stream import Stream

SPEC = SampleSpec(image_size=16, grid=4, context_length=8)
SHARDS = 3


def jpeg_bomb() -> bytes:
    """A JPEG whose header says 60,000 x 60,000 pixels."""
    data = bytearray(encode(noise(0), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def animated(format: str) -> bytes:
    frames = [Image.fromarray(noise(n)) for n in range(3)]
    output = io.BytesIO()
    frames[0].save(output, format, save_all=True, append_images=frames[1:])
    return output.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(1), "JPEG", exif=exif)


def pil(image: Image.Image, format: str) -> bytes:
    output = io.BytesIO()
    image.save(output, format)
    return output.getvalue()


CAPTION = b"a caption"
BAD: dict[str, tuple[Files, str]] = {
    "zero-byte image": ({"jpg": b"", "txt": CAPTION}, "image cannot be decoded"),
    "zeros": ({"jpg": b"\0" * 300, "txt": CAPTION}, "image cannot be decoded"),
    "cut image": ({"jpg": encode(smooth_photo(), "JPEG")[:3000], "txt": CAPTION}, "image cannot be decoded"),
    "cut png": ({"png": encode(noise(2))[:200], "txt": CAPTION}, "image cannot be decoded"),
    "png bomb": ({"png": bomb(), "txt": CAPTION}, "image is too large"),
    "jpeg bomb": ({"jpg": jpeg_bomb(), "txt": CAPTION}, "image is too large"),
    "no caption": ({"jpg": encode(noise(3), "JPEG")}, "caption is missing"),
    "blank caption": ({"jpg": encode(noise(3), "JPEG"), "txt": b" \n"}, "caption is missing"),
    "latin-1 caption": ({"jpg": encode(noise(4), "JPEG"), "txt": "caf\xe9".encode("latin-1")}, "caption is not UTF-8"),
    "wrong keys": ({"picture": encode(noise(5), "JPEG"), "txt": CAPTION}, "image is missing"),
}
ODD: dict[str, Files] = {
    "cmyk": {"jpg": pil(Image.fromarray(noise(6)).convert("CMYK"), "JPEG")},
    "grey": {"jpg": pil(Image.fromarray(noise(7)).convert("L"), "JPEG")},
    "palette": {"png": pil(Image.fromarray(noise(8)).convert("P"), "PNG")},
    "16-bit": {"png": pil(Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100), "PNG")},
    "animated webp": {"webp": animated("WEBP")},
    "animated png": {"png": animated("PNG")},
    "animated gif": {"jpg": animated("GIF")},
    "rotated": {"jpg": rotated()},
    "upper-case": {"JPG": encode(noise(9), "JPEG")},
}


def planted(folder: Path) -> tuple[Path, list[str]]:
    """Write three shards with good, odd and bad samples mixed; return the folder and the keys that a run can use."""
    folder.mkdir()
    samples: list[tuple[str, Files]] = [
        (f"good-{n}", {"jpg": encode(noise(n), "JPEG"), "txt": CAPTION}) for n in range(14)
    ]
    samples += [(f"odd {name}", {"txt": CAPTION, **files}) for name, files in ODD.items()]
    usable = [key for key, _ in samples]
    samples += [(f"bad {name}", files) for name, (files, _) in BAD.items()]
    for shard in range(SHARDS):
        write_shard(folder / f"{shard}.tar", samples[shard::SHARDS])
    return folder, usable


def read_epoch(folder: Path, drawn: int, **changes: Any) -> tuple[list[str], Counter[str]]:
    """Read until `drawn` samples were drawn, usable or not."""
    settings: dict[str, Any] = {"lanes": 1, "shuffle": 4, "workers": 0, "max_bad_fraction": 1.0}
    data = DataConfig(train=str(folder), **(settings | changes))
    keys: list[str] = []
    with closing(Stream(data, SPEC, global_batch=1, seed=8, rank=0, size=1)) as stream:
        while len(keys) + sum(stream.bad.values()) < drawn:
            keys += stream.next().keys
            lanes = stream.position()["lanes"].values()
            assert sum(lane["0"]["drawn"] for lane in lanes) == len(keys) + sum(stream.bad.values())
        return keys, Counter(stream.bad)


def test_bad_samples_are_counted_by_reason_and_odd_ones_are_read(tmp_path: Path) -> None:
    folder, usable = planted(tmp_path / "a")
    keys, bad = read_epoch(folder, len(usable) + len(BAD))
    assert Counter(keys[: len(usable)]) == Counter(usable)
    assert bad - Counter() == Counter(reason for _, reason in BAD.values())


def test_damaged_shards_are_counted_once_each_and_empty_ones_are_none(tmp_path: Path) -> None:
    folder, usable = planted(tmp_path / "a")
    whole = (folder / "0.tar").read_bytes()
    write_shard(folder / "3.tar", [])
    (folder / "4.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "5.tar").write_bytes(b"")
    (folder / "6.tar").write_bytes(b"not a tar file" * 100)
    (folder / "7.tar").write_bytes(whole[:-10240] if whole.endswith(b"\0" * 10240) else whole.rstrip(b"\0"))
    damage = [sample.damage for index in range(3, 8) for sample in read_shard(str(folder / f"{index}.tar"))]
    assert Counter(damage) - Counter([""] * 99) == {"shard is damaged": 4}
    drawn = sum(1 for index in range(8) for _ in read_shard(str(folder / f"{index}.tar")))
    keys, bad = read_epoch(folder, drawn)
    assert set(keys) == set(usable)
    assert (bad["shard is damaged"], bad["shard is empty"]) == (4, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_while_training_is_skipped(tmp_path: Path, workers: int) -> None:
    folder = write_shards(tmp_path / "a", [4, 4, 4, 4])
    data = DataConfig(train=str(folder), lanes=1, shuffle=1, workers=workers, max_bad_fraction=1.0)
    with closing(Stream(data, SPEC, global_batch=1, seed=0, rank=0, size=1)) as stream:
        first = [stream.next().keys[0] for _ in range(2)]
        for path in folder.iterdir():
            if path.name != f"0000{first[0][:2]}.tar":
                path.unlink()
        seen = first + [stream.next().keys[0] for _ in range(12)]
        assert stream.bad["shard is gone"] >= 3
    # Workers are some steps ahead and may have had one of the others open.
    assert len(set(seen)) in (4, 8)


class Failing:
    """fsspec's memory file system, whose files break after some bytes a given number of times."""

    def __init__(self, failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures, self.waits = failures, list[float]()
        self.original = fsspec.filesystem("memory").open
        monkeypatch.setattr(
            type(fsspec.filesystem("memory")), "_open", self.open(type(fsspec.filesystem("memory"))._open)
        )
        monkeypatch.setattr(
            "w2s.data.shards.storage.SourceConnection.pause", lambda _, seconds: self.waits.append(seconds)
        )

    def open(self, original: Any) -> Any:
        def opened(filesystem: Any, path: str, *args: Any, **options: Any) -> Any:
            if self.failures > 0:
                self.failures -= 1
                data = original(filesystem, path, *args, **options).getvalue()
                return Breaking(data[: len(data) // 2])
            return original(filesystem, path, *args, **options)

        return opened


class Breaking(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data and size:
            raise ConnectionError("503 Service Unavailable")
        return data


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[str]:
    write_shards(tmp_path / "a", [8])
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/000000.tar", (tmp_path / "a" / "000000.tar").read_bytes())
    yield "memory://bucket/000000.tar"
    memory.rm("/bucket", recursive=True)


def test_a_server_that_fails_for_a_while_costs_nothing(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Failing(3, monkeypatch)
    assert [sample.key for sample in read_shard(remote)] == [f"00-{n:03d}" for n in range(8)]
    # The second half is asked for by its first byte, at once; then nothing comes.
    assert server.waits == [0.5, 1.0]


def test_a_server_that_fails_for_good_costs_the_rest_of_the_shard(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Failing(10**6, monkeypatch)
    samples = list(read_shard(remote))
    assert 3 <= len(samples) <= 5
    assert [sample.damage for sample in samples] == [""] * (len(samples) - 1) + ["shard cannot be read"]
    assert server.waits == list(WAITS)


def test_a_remote_shard_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Failing(0, monkeypatch)
    assert [sample.damage for sample in read_shard("memory://bucket/none.tar")] == ["shard is gone"]
    assert server.waits == []
