"""Encoded images to pixels."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from w2s.data.bad import BadSample

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded."""

_ORIENTATION = 0x0112
_EXIF_MARKER = b"Exif\x00\x00"


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode a whole image to uint8 RGB [height, width, 3]; as `decode_crop`."""
    return decode_crop(data, lambda height, width: (0, 0, height, width))


def decode_crop(data: bytes, choose: Callable[[int, int], Box], *, half_from: int | None = None) -> NDArray[np.uint8]:
    """Decode an image and cut out a crop: uint8 RGB [crop height, crop width, 3].

    JPEG goes through libjpeg-turbo; every other format, and a JPEG that has to be turned or that libjpeg-turbo
    refuses, through Pillow. Transparent pixels are laid on white, the EXIF orientation is applied, and of an animation
    the first picture is taken.

    Args:
        data: the encoded image.
        choose: gets height and width, returns the crop.
        half_from: crops of a JPEG with at least so many pixels on both sides are decoded at half of their size, by a
            transform of 4 x 4 instead of 8 x 8 coefficients; None never does.

    Raises:
        BadSample: not an image, damaged, truncated, or larger than 100 megapixels.
    """
    if data[:2] == b"\xff\xd8":
        crop = _decode_jpeg(data, choose, half_from)
        if crop is not None:
            return crop
    try:
        pixels = _decode_any(data)
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise BadSample("image cannot be decoded") from error
    return _cut(pixels, choose(*pixels.shape[:2]))


def _cut(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _decode_jpeg(data: bytes, choose: Callable[[int, int], Box], half_from: int | None) -> NDArray[np.uint8] | None:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if _EXIF_MARKER in data and _orientation(data) != 1:
            return None
        box = choose(height, width)
        if half_from is None or min(box[2:]) < half_from:
            return _cut(simplejpeg.decode_jpeg(data), box)
        half = simplejpeg.decode_jpeg(data, min_height=-(-height // 2), min_width=-(-width // 2), min_factor=2)
        return _cut(half, (box[0] // 2, box[1] // 2, box[2] // 2, box[3] // 2))
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
