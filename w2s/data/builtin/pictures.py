"""Pictures of the built-in data sets: drawn from SVG files, on white squares, as PNG."""

import io
from pathlib import Path

from PIL import Image

SVG_WIDTH = 128
_MARGIN = 0.04


def draw_svg(path: Path) -> Image.Image:
    """Draw an SVG file, 128 pixels wide, as RGBA.

    Raises:
        ValueError: the file cannot be drawn.
    """
    from resvg_py import svg_to_bytes

    # Without a resolution every drawing whose size is in points or centimetres is refused.
    drawn = bytes(svg_to_bytes(svg_path=str(path), width=SVG_WIDTH, dpi=96.0, skip_system_fonts=True))
    return Image.open(io.BytesIO(drawn)).convert("RGBA")


def on_white(image: Image.Image) -> Image.Image:
    """Put a picture on a white square with a small margin: RGB."""
    image = image.convert("RGBA")
    side = round(max(image.size) * (1 + 2 * _MARGIN))
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB")


def png(image: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()
