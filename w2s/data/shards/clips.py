"""The pictures of a sample: one image, or the frames that stand for a clip."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from w2s.data.shards.video import decode_frames, is_video, spread

Picture = bytes | NDArray[np.uint8]
"""An encoded image, or a decoded frame of a video: uint8 RGB [height, width, 3]."""

_MARKS = {
    "png": rb"\x89PNG",
    "webp": rb"RIFF....WEBP",
    "gif": rb"GIF8",
    "bmp": rb"BM",
    "tif": rb"II\*\x00|MM\x00\*",
    "mp4": rb"....ftyp",
    "mkv": rb"\x1aE\xdf\xa3",
    "avi": rb"RIFF....AVI ",
}
_NUMBERED = re.compile(r"(\d+)\.(.+)")


def kind(extension: str) -> str:
    """Return what a file is, by its extension: that of a numbered one (`000.jpg`) without the number."""
    numbered = _NUMBERED.fullmatch(extension)
    return numbered[2] if numbered else extension


def extension_of(data: bytes) -> str:
    """Return the extension of an image or a video by its first bytes; what is none of these is called a JPEG."""
    return next((name for name, mark in _MARKS.items() if re.match(mark, data, re.DOTALL)), "jpg")


def find_images(files: Mapping[str, bytes], image_key: str) -> list[bytes]:
    """Return the image or the video of a sample, or the numbered images of a clip in their order; none where none is.

    Args:
        files: contents by extension.
        image_key: extensions, separated by `;`: the first that is there is taken, without a number or with.
    """
    for name in image_key.split(";"):
        if name in files:
            return [files[name]]
        numbered = {
            int(match[1]): files[match[0]] for match in map(_NUMBERED.fullmatch, files) if match and match[2] == name
        }
        if numbered:
            return [numbered[number] for number in sorted(numbered)]
    return []


def choose_frames(images: Sequence[bytes], frames: int) -> list[Picture]:
    """Return the pictures that stand for a sample: those in the middles of `frames` equal parts of its clip.

    Of a clip with fewer frames some come several times; an image is a clip of one.

    Raises:
        BadSample: it is a video that cannot be decoded.
        MissingPackageError: it is a video, and PyAV is not installed.
    """
    if len(images) == 1 and is_video(images[0]):
        return list(decode_frames(images[0], frames))
    return [images[number] for number in spread(len(images), frames)]
