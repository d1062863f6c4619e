"""Encoded images to pixels."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from w2s.data.samples.frames import Picture
from w2s.data.shards.raw_sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's decoders that are used; others start programs (EPS runs Ghostscript) or are hardly looked after."""
MAX_PIXELS = {
    "baseline": 100_000_000,  # a JPEG in libjpeg-turbo: 3 bytes a pixel
    "progressive": 40_000_000,  # with its coefficients: up to 12
    "JPEG": 60_000_000,  # 8: Pillow's pixels have 4, and are turned
    "PNG": 60_000_000,
    "GIF": 60_000_000,
    "BMP": 60_000_000,
    "TIFF": 40_000_000,  # 12: the strip, its pixels, and the same turned
    "WEBP": 25_000_000,  # 20: the canvases of an animation too
}
"""Larger images are refused before they are decoded, so that none takes more than about 500 MB."""
MAX_SCANS = 64
"""A progressive JPEG of more is refused: each scan goes over the whole image, and encoders write about ten."""

_STRIP = 4_000_000
"""Pixels of a large image that are converted at a time."""
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_NO_FRAME = (0xC4, 0xC8, 0xCC)
_ORIENTATION = 0x0112
_EXIF_MARKER = b"Exif\x00\x00"


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def decode_image(picture: Picture) -> NDArray[np.uint8]:
    """Decode a whole image to uint8 RGB [height, width, 3]; as `decode_crop`."""
    return decode_crop(picture, lambda height, width: (0, 0, height, width))


def decode_crop(
    picture: Picture, choose: Callable[[int, int], Box], *, half_from: int | None = None
) -> NDArray[np.uint8]:
    """Decode an image and cut out a crop: uint8 RGB [crop height, crop width, 3].

    JPEG goes through libjpeg-turbo; every other format, and a JPEG that has to be turned or that libjpeg-turbo
    refuses, through Pillow. Transparent pixels are laid on white, the EXIF orientation is applied, and of an animation
    the first picture is taken.

    Args:
        picture: the encoded image, or a frame that is decoded already.
        choose: gets height and width, returns the crop.
        half_from: crops of a JPEG with at least so many pixels on both sides are decoded at half of their size, by a
            transform of 4 x 4 instead of 8 x 8 coefficients; None never does.

    Raises:
        BadSample: none of `FORMATS`, damaged, truncated, or larger than `MAX_PIXELS`.
    """
    if isinstance(picture, np.ndarray):
        return _cut(picture, choose(*picture.shape[:2]))
    if picture[:2] == b"\xff\xd8":
        crop = _decode_jpeg(picture, choose, half_from)
        if crop is not None:
            return crop
    try:
        pixels = _decode_any(picture)
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise BadSample("image cannot be decoded") from error
    return _cut(pixels, choose(*pixels.shape[:2]))


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Open an image with one of Pillow's decoders in `FORMATS`; nothing is decoded yet.

    Raises:
        BadSample: it is larger than `MAX_PIXELS`.
        OSError: it is none of these formats, or damaged.
    """
    with warnings.catch_warnings():
        # Our own limit is checked right after; Pillow's warning would only repeat it for every worker.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise BadSample("image is too large") from error
    _check_size(*image.size, MAX_PIXELS.get(image.format or "", MAX_PIXELS["JPEG"]))
    return image


def _cut(pixels: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    top, left, height, width = box
    return pixels[top : top + height, left : left + width]


def _decode_jpeg(data: bytes, choose: Callable[[int, int], Box], half_from: int | None) -> NDArray[np.uint8] | None:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        progressive = _frame(data) in _PROGRESSIVE
        _check_size(width, height, MAX_PIXELS["progressive" if progressive else "baseline"])
        if progressive and data.count(b"\xff\xda") > MAX_SCANS:
            raise BadSample("image has too many scans")
        if _EXIF_MARKER in data and _orientation(data) != 1:
            return None
        box = choose(height, width)
        if half_from is None or min(box[2:]) < half_from:
            return _cut(simplejpeg.decode_jpeg(data), box)
        half = simplejpeg.decode_jpeg(data, min_height=-(-height // 2), min_width=-(-width // 2), min_factor=2)
        return _cut(half, (box[0] // 2, box[1] // 2, box[2] // 2, box[3] // 2))
    except ValueError:
        return None


def _frame(data: bytes) -> int:
    """The marker of a JPEG's frame, which names the kind of its coding; 0 where none is found."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            return marker
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _orientation(data: bytes) -> int:
    try:
        orientation: int = Image.open(io.BytesIO(data), formats=["JPEG"]).getexif().get(_ORIENTATION, 1)
        return orientation
    except (OSError, SyntaxError) as error:
        raise ValueError("unreadable EXIF data") from error


def _decode_any(data: bytes) -> NDArray[np.uint8]:
    image = ImageOps.exif_transpose(open_image(io.BytesIO(data)))
    rows = max(1, _STRIP // image.width)
    if rows >= image.height:
        return np.array(_to_rgb(image))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(_to_rgb(strip))
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow's conversion would clip 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _check_size(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise BadSample("image is too large")
