"""Encoded images to pixels."""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from w2s.data.bad import BadSample

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded."""

_ORIENTATION = 0x0112
_EXIF_MARKER = b"Exif\x00\x00"


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode an image to uint8 RGB [height, width, 3].

    JPEG goes through libjpeg-turbo; every other format, and a JPEG that has to be turned or that libjpeg-turbo
    refuses, through Pillow. Transparent pixels are laid on white and the EXIF orientation is applied.

    Raises:
        BadSample: not an image, damaged, truncated, or larger than 100 megapixels.
    """
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    try:
        return _decode_any(data)
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise BadSample("image cannot be decoded") from error


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if _EXIF_MARKER in data and _orientation(data) != 1:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
        return pixels
    except ValueError:
        return None


def _orientation(data: bytes) -> int:
    try:
        orientation: int = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
        return orientation
    except (OSError, SyntaxError) as error:
        raise ValueError("unreadable EXIF data") from error


def _decode_any(data: bytes) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        # Our own limit is checked right after; Pillow's warning would only repeat it for every worker.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise BadSample("image is too large") from error
    _check_size(*image.size)
    return np.array(_to_rgb(ImageOps.exif_transpose(image)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow's conversion would clip 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadSample("image is too large")
