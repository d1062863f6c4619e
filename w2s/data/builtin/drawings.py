"""Pictures of the built-in data sets: drawn from SVG files, on white squares, as PNG."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageStat

from w2s.data.samples.decode import open_image

_MARGIN = 0.04
_BLANK = 2.0
"""Standard deviation of the grey levels (0 to 255) below which nothing can be made out."""


@dataclass(frozen=True)
class Drawing:
    """A picture that somebody has made of something with a name."""

    key: str
    """What it is called in its source: code points, or a path."""
    name: str
    image: Image.Image


def draw_svg(path: Path, width: int) -> Image.Image:
    """Draw an SVG file as RGBA.

    Args:
        path: the file.
        width: of the picture in pixels.

    Raises:
        ValueError: the file cannot be drawn.
    """
    from resvg_py import svg_to_bytes

    # Without a resolution every drawing whose size is in points or centimetres is refused.
    drawn = bytes(svg_to_bytes(svg_path=str(path), width=width, dpi=96.0, skip_system_fonts=True))
    return open_image(io.BytesIO(drawn)).convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """Put a picture on a white square with a small margin: RGB."""
    image = image.convert("RGBA")
    side = round(max(image.size) * (1 + 2 * _MARGIN))
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB")


def within(image: Image.Image, side: int) -> Image.Image:
    """Return a picture of at most `side` x `side` pixels."""
    smaller = image.copy()
    smaller.thumbnail((side, side))
    return smaller


def is_blank(image: Image.Image) -> bool:
    """Whether there is next to nothing to see."""
    return ImageStat.Stat(image.convert("L")).stddev[0] < _BLANK


def png(image: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()
