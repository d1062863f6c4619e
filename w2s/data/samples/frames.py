"""The pictures of a sample: one image, or the frames that stand for a clip; videos through PyAV (`w2s[video]`)."""

import io
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w2s.data.shards.raw_sample import BadSample
from w2s.errors import MissingPackageError

Picture = bytes | NDArray[np.uint8]
"""An encoded image, or a decoded frame of a video: uint8 RGB [height, width, 3]."""

MAX_PIXELS = 4096 * 2304
"""Pixels of a frame; a decoder keeps up to 16 of them."""
MAX_FRAMES = 20_000
"""Frames of a video, which are decoded one after the other; a longer one is refused before."""

_FORMATS = {(4, b"ftyp"): "mp4", (0, b"\x1aE\xdf\xa3"): "matroska", (8, b"AVI "): "avi"}
"""FFmpeg's readers by what stands at a byte of a file. None of them opens other files, as those of playlists do."""


def choose_frames(images: Sequence[bytes], frames: int) -> list[Picture]:
    """Return the pictures that stand for a sample: those in the middles of `frames` equal parts of its clip.

    Of a clip with fewer frames some come several times; an image is a clip of one.

    Raises:
        BadSample: it is a video that cannot be decoded.
        MissingPackageError: it is a video, and PyAV is not installed.
    """
    if len(images) == 1 and is_video(images[0]):
        return list(decode_frames(images[0], frames))
    return [images[index] for index in spread(len(images), frames)]


def is_video(data: bytes) -> bool:
    """Whether a file is an MP4 (MOV), Matroska (WebM) or AVI file."""
    return _format(data) is not None


def spread(count: int, frames: int) -> list[int]:
    """Return which of `count` frames stand for a clip: those in the middles of `frames` equal parts of it."""
    return [(2 * part + 1) * count // (2 * frames) for part in range(frames)]


def decode_frames(data: bytes, frames: int) -> list[NDArray[np.uint8]]:
    """Decode the frames that stand for a video, in the order of time: uint8 RGB [height, width, 3] each.

    Args:
        data: the file.
        frames: how many; where the video has fewer, some come several times.

    Raises:
        BadSample: the video is damaged, too large or too long.
        MissingPackageError: PyAV is not installed.
    """
    check_decoder()
    import av

    try:
        with av.open(io.BytesIO(data), format=_format(data)) as container:
            count = _count(container)
        with av.open(io.BytesIO(data), format=_format(data)) as container:
            return _decode(container, spread(count, frames))
    except BadSample:
        raise
    except Exception as error:  # FFmpeg's own errors, and those of PyAV where a file has no pictures
        raise BadSample("video cannot be decoded") from error


def check_decoder() -> None:
    """Check that videos can be decoded.

    Raises:
        MissingPackageError: PyAV is not installed.
    """
    if find_spec("av") is None:
        raise MissingPackageError("videos need PyAV: pip install 'w2s[video]'")


def _format(data: bytes) -> str | None:
    return next((name for (place, mark), name in _FORMATS.items() if data.startswith(mark, place)), None)


def _count(container: Any) -> int:
    """The number of frames by the packets, of which each has one; the last, an empty one, has none."""
    video = container.streams.video[0]
    if video.codec_context.width * video.codec_context.height > MAX_PIXELS:
        raise BadSample("image is too large")
    packets = (packet for packet in container.demux(video) if packet.size and not packet.is_discard)
    count = sum(1 for _ in islice(packets, MAX_FRAMES + 1))
    if count > MAX_FRAMES:
        raise BadSample("video is too long")
    return count


def _decode(container: Any, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
    video = container.streams.video[0]
    # Reading processes are many already. A later frame may claim to be larger than the first.
    video.codec_context.thread_count = 1
    video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    pictures = dict(_frames_at(container.decode(video), set(indices)))
    # An edited video can have fewer frames than packets: the last one stands for those that are missing.
    return [pictures.get(index, pictures[max(pictures)]) for index in indices]


def _frames_at(decoded: Iterator[Any], indices: set[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for index, frame in enumerate(islice(decoded, max(indices) + 1)):
        if index in indices:
            pixels = frame.to_ndarray(format="rgb24", threads=1)
            yield index, np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
