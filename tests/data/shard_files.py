"""Small shards for the tests of this folder."""

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

Files = dict[str, bytes]


def encode(pixels: NDArray[np.uint8], format: str = "PNG", **options: object) -> bytes:
    output = io.BytesIO()
    Image.fromarray(pixels).save(output, format, **options)
    return output.getvalue()


def noise(seed: int, height: int = 20, width: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def smooth_photo(height: int = 400, width: int = 500) -> NDArray[np.uint8]:
    """A picture with soft gradients and waves, as a photograph has."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / 37 + c) + np.cos(y / 23 - c) + np.sin((x + y) / 61 * (1 + c / 3)) for c in range(3)]
    return np.stack([(w - w.min()) / (w.max() - w.min()) * 255 for w in waves], axis=-1).astype(np.uint8)


def good_sample(index: int) -> Files:
    return {"png": encode(noise(index)), "txt": f"a picture of {index % 7}".encode()}


def bomb() -> bytes:
    """A PNG that claims 20,000 x 20,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def write_shard(path: Path, samples: Iterable[tuple[str, Files]]) -> None:
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})


def write_shards(folder: Path, sizes: list[int], replace: dict[str, Files] | None = None) -> Path:
    """Write shards of good samples with keys SHARD-NUMBER, except for the samples of `replace`."""
    replace = replace or {}
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        keys = [f"{shard:02d}-{index:03d}" for index in range(size)]
        samples = [(key, replace.get(key, good_sample(shard * 1000 + n))) for n, key in enumerate(keys)]
        write_shard(folder / f"{shard:06d}.tar", samples)
    return folder
