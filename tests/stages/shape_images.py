"""A small data set of drawn shapes with their names, as webdataset shards."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw
from webdataset import TarWriter

COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = [f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS]
SIDE = 48


def write_shapes(folder: Path, shards: int, seed: int) -> Path:
    """Write shards that hold every name once: images in `png`, names in `txt`, class numbers in `cls`."""
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    for index, shard in enumerate(draw_shapes(shards, seed)):
        with TarWriter(str(folder / f"{index:06d}.tar"), encoder=False, mtime=0) as writer:
            for place, (label, image) in enumerate(shard):
                files = {"png": image, "txt": NAMES[label].encode(), "cls": str(label).encode()}
                writer.write({"__key__": f"{index:03d}-{place:03d}", **files})
    return folder


def write_clips(folder: Path, shards: int, seed: int, frames: int) -> Path:
    """Write shards as `write_shapes`, of clips: in each frame the shape is somewhere else, on another ground."""
    folder.mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    parts = [list(draw_shapes(shards, seed + frame)) for frame in range(frames)]
    for index in range(shards):
        pictures = [dict(part[index]) for part in parts]
        with TarWriter(str(folder / f"{index:06d}.tar"), encoder=False, mtime=0) as writer:
            for label in pictures[0]:
                files = {f"{frame:03d}.png": of_frame[label] for frame, of_frame in enumerate(pictures)}
                names = {"txt": NAMES[label].encode(), "cls": str(label).encode()}
                writer.write({"__key__": f"{index:03d}-{label:03d}", **files, **names})
    return folder


def draw_shapes(count: int, seed: int) -> Iterator[list[tuple[int, bytes]]]:
    """Every name once in each of `count` shards: its number and the image."""
    rng = random.Random(seed)
    for _ in range(count):
        labels = list(range(len(NAMES)))
        rng.shuffle(labels)
        yield [(label, _draw(label, rng)) for label in labels]


def _draw(label: int, rng: random.Random) -> bytes:
    """A shape of some size somewhere on a light ground."""
    shape, colour = SHAPES[label // len(COLOURS)], COLOURS[label % len(COLOURS)]
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(200, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    size = rng.randrange(SIDE // 3, SIDE * 3 // 4)
    left, top = rng.randrange(SIDE - size), rng.randrange(SIDE - size)
    right, bottom, arm = left + size, top + size, size // 3
    match shape:
        case "circle":
            draw.ellipse((left, top, right, bottom), fill=colour)
        case "square":
            draw.rectangle((left, top, right, bottom), fill=colour)
        case "triangle":
            draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
        case _:
            draw.rectangle((left + arm, top, right - arm, bottom), fill=colour)
            draw.rectangle((left, top + arm, right, bottom - arm), fill=colour)
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()
