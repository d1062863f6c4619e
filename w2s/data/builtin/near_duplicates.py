"""Which pictures are nearly the same: the same drawing at another size or place, or with another margin."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from w2s.data.builtin.write_shards import Pair
from w2s.data.samples.decode import open_image

_SAME = 0.95
"""Correlation from which two pictures count as the same.

81 of Tux Paint's 701 stamps have a training drawing at or above it, by eye the same one but for three round things; the
14 more at or above 0.9 are round things too.
"""
_ASPECT = 0.15
"""Largest difference of the logarithms of width / height."""
_SIDE = 16
_PAPER = 8
"""Grey levels that a pixel may differ from white and still be not part of the drawing."""
_ROWS = 512


def near_duplicates_in(pairs: Sequence[Pair], others: Sequence[Pair]) -> NDArray[np.bool_]:
    """Say for each pair whether its picture is nearly one of the others': [n]."""
    if not pairs or not others:
        return np.zeros(len(pairs), bool)
    pixels, aspects = _describe(pairs)
    other_pixels, other_aspects = _describe(others)
    duplicates = []
    for first in range(0, len(pairs), _ROWS):
        rows = slice(first, first + _ROWS)
        alike = pixels[rows] @ other_pixels.T >= _SAME
        alike &= np.abs(aspects[rows, None] - other_aspects) <= _ASPECT
        duplicates.append(alike.any(1))
    return np.concatenate(duplicates)


def _describe(pairs: Sequence[Pair]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pixels [n, 768] without their mean and of length 1, and the logarithms of width / height [n]."""
    drawings = [_without_paper(open_image(io.BytesIO(pair.png)).convert("RGB")) for pair in pairs]
    small = [drawing.resize((_SIDE, _SIDE), Image.Resampling.BOX) for drawing in drawings]
    pixels = np.stack([np.asarray(image, np.float32).ravel() for image in small])
    pixels -= pixels.mean(1, keepdims=True)
    pixels /= np.maximum(np.linalg.norm(pixels, axis=1, keepdims=True), 1e-6)  # one of a single colour is like none
    return pixels, np.log([drawing.width / drawing.height for drawing in drawings]).astype(np.float32)


def _without_paper(image: Image.Image) -> Image.Image:
    ink = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
    return image.crop(ink.point(lambda level: 255 * (level > _PAPER)).getbbox())
