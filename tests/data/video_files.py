"""Small videos for tests, whose frames can be told apart by their brightness."""

import io

import numpy as np
import pytest

SIDE = 64


def write_video(
    frames: int, *, format: str = "mp4", codec: str = "libx264", rotation: int = 0, side: int = SIDE
) -> bytes:
    """A video of up to 32 grey frames, each 8 brighter than the one before, with a white top left corner."""
    av = pytest.importorskip("av")
    output = io.BytesIO()
    with av.open(output, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 2 * side, side, "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            pixels = np.full((side, 2 * side, 3), 8 * index, np.uint8)
            pixels[: side // 2, :side] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return output.getvalue()
