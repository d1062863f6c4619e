"""Shards of photographs for the benchmark of the loaders."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from w2s.data.making.items import IMAGES
from w2s.data.samples.decode import open_image
from w2s.errors import DataError

SHARDS = 4


def cut_shards(
    photographs: Path,
    out: Path,
    width: int,
    height: int,
    count: int,
    *,
    shards: int = SHARDS,
    distinct: int | None = None,
) -> str:
    """Cut JPEGs of about `width` x `height` pixels out of photographs, and write them into shards.

    No two have the same size, so that a size names an image. Each is a random part of a photograph, made smaller, with
    a JPEG quality of 85 to 95.

    Args:
        photographs: folder of photographs.
        out: folder for the shards.
        width: of the images, in pixels.
        height: of the images, in pixels.
        count: number of samples.
        shards: number of shards.
        distinct: images after which the same come again; None makes all of them anew.

    Returns:
        The brace pattern of the shards.

    Raises:
        DataError: there is no photograph that is large enough.
    """
    out.mkdir(parents=True)
    anew = min(count, distinct or count)
    pictures = _pictures(photographs, round(1.06 * width), round(1.06 * height), anew, np.random.default_rng(0))
    jpegs = list(pictures)
    for shard in range(shards):
        with TarWriter(str(out / f"{shard:06d}.tar"), encoder=False, mtime=0) as writer:
            for index in range(shard, count, shards):
                caption = f"a photograph that shows number {index} of {count} things".encode()
                writer.write({"__key__": f"{index:06d}", "jpg": jpegs[index % anew], "txt": caption})
    return f"{out}/{{000000..{shards - 1:06d}}}.tar"


def _pictures(
    photographs: Path, most_width: int, most_height: int, count: int, rng: np.random.Generator
) -> Iterator[bytes]:
    paths = [path for path in sorted(photographs.rglob("*")) if path.suffix[1:].lower() in IMAGES]
    large = [path for path in paths if _fits(path, most_width, most_height)]
    if not large:
        raise DataError(f"{photographs} has no photograph of at least {most_width} x {most_height} pixels")
    # Sizes within 6 % of the wanted ones, each once.
    columns = most_width - round(most_width / 1.06 * 0.94)
    for place, path in enumerate(large):
        with open_image(path) as image:
            whole = image.convert("RGB")
        for index in range(place, count, len(large)):
            size = most_width - index % columns, most_height - index // columns
            yield _part(whole, size, rng)


def _fits(path: Path, width: int, height: int) -> bool:
    with open_image(path) as image:
        return image.width >= width and image.height >= height


def _part(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    scale = rng.uniform(1, min(image.width / size[0], image.height / size[1]))
    width, height = int(size[0] * scale), int(size[1] * scale)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    part = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    output = io.BytesIO()
    part.save(output, "JPEG", quality=int(rng.integers(85, 96)))
    return output.getvalue()
