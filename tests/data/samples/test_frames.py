import importlib.util

import numpy as np
import pytest

from tests.data.shard_files import encode, noise, write_shard
from tests.data.video_files import SIDE, write_video
from w2s.data.samples import frames as frames_module
from w2s.data.samples.frames import decode_frames, is_video, spread
from w2s.data.samples.sample import SampleSpec, make_sample
from w2s.data.shards.containers import read_shard
from w2s.data.shards.raw_sample import BadSample, RawSample
from w2s.data.stream.sources import check_source
from w2s.errors import MissingPackageError


def greys(data: bytes, frames: int) -> list[float]:
    return [float(np.median(frame[:, SIDE + 4 :])) for frame in decode_frames(data, frames)]


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libvpx-vp9"), ("avi", "mpeg4")]
)
def test_the_frames_of_a_video_are_those_in_the_middles_of_equal_parts(format: str, codec: str) -> None:
    data = write_video(30, format=format, codec=codec)
    assert is_video(data)
    # Frames are 8 apart, and the codecs keep a flat grey to 3.
    assert greys(data, 4) == pytest.approx([8 * number for number in spread(30, 4)], abs=3)
    assert greys(data, 1) == pytest.approx([8 * 15], abs=3)


def test_a_short_video_repeats_frames() -> None:
    assert greys(write_video(2), 4) == pytest.approx([0, 0, 8, 8], abs=3)


def test_a_video_that_is_turned_is_turned_back() -> None:
    def white(rotation: int) -> tuple[int, int]:
        (frame,) = decode_frames(write_video(1, rotation=rotation), 1)
        assert (frame.shape[0] > frame.shape[1]) == (rotation != 180)
        ends = [frame[y, x].min() > 200 for y in (4, -4) for x in (4, -4)]
        assert sum(ends) == 1
        return divmod(ends.index(True), 2)

    # Counter-clockwise, as FFmpeg says it: the top left corner goes to the bottom left.
    assert (white(90), white(-90), white(180)) == ((1, 0), (0, 1), (1, 1))


def test_images_are_no_videos() -> None:
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert not is_video(encode(noise(0), format))
    assert not is_video(b"#EXTM3U\nhttp://127.0.0.1/a.ts\n")


def test_a_video_that_cannot_be_used_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_video(8)
    for damaged in (data[:100], data[: len(data) // 2], data[:40] + b"?" * 2000):
        with pytest.raises(BadSample, match="video cannot be decoded"):
            decode_frames(damaged, 2)
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 7)
    with pytest.raises(BadSample, match="video is too long"):
        decode_frames(data, 2)
    monkeypatch.setattr(frames_module, "MAX_PIXELS", SIDE * SIDE)
    with pytest.raises(BadSample, match="image is too large"):
        decode_frames(data, 2)


def test_a_video_is_a_clip_of_a_shard(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", [("one", {"mp4": write_video(12), "txt": b"a grey ramp"})])
    shard = str(tmp_path / "a.tar")
    spec = SampleSpec(image_size=16, grid=4, frames=3, image_key="jpg;mp4", crop_scale=(1, 1), flip=False)
    (sample,) = read_shard(shard, wanted=spec.extensions)
    views = make_sample(sample, spec, 0, 0)
    assert views.images.shape == (1, 3, 3, 16, 16)
    assert views.images[0, :, :, -1, -1].float().mean(1).tolist() == pytest.approx([16, 48, 80], abs=3)
    check_source([shard], "mp4", "txt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(frames_module, "find_spec", lambda name: None)
    for use in (
        lambda: check_source([shard], "mp4", "txt"),
        lambda: make_sample(RawSample("a", "b", sample.files), spec, 0, 0),
    ):
        with pytest.raises(MissingPackageError, match=r"videos need PyAV: pip install 'w2s\[video\]'"):
            use()
