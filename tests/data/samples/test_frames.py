"""The pictures that stand for a sample: an image, numbered images, or frames of a video."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.shard_files import encode, noise, write_shard
from tests.data.video_files import SIDE, write_video
from w2s.data.samples import frames as frames_module
from w2s.data.samples.batch import Batch
from w2s.data.samples.frames import choose_frames, decode_frames, is_video, spread
from w2s.data.samples.sample import SampleSpec, make_sample
from w2s.data.shards.containers import read_shard
from w2s.data.shards.raw_sample import BadSample, RawSample, find_images
from w2s.data.stream.sources import check_source
from w2s.errors import MissingPackageError

SPEC = SampleSpec(image_size=16, grid=4, num_kept_patches=8, layers=12, drop_path=0.5, frames=4)
IMAGES = [encode(noise(index)) for index in range(11)]


def views_of(files: dict[str, bytes], spec: SampleSpec = SPEC) -> Batch:
    return make_sample(RawSample("key", "shard", files), spec, 3, 5)


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert spread(9, 1) == [4]  # the middle frame
    assert spread(16, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert spread(300, 4) == [37, 112, 187, 262]
    assert spread(3, 6) == [0, 0, 1, 1, 2, 2]
    assert spread(1, 3) == [0, 0, 0]


def test_numbered_images_are_frames_in_the_order_of_their_numbers() -> None:
    files = {f"{index}.png": image for index, image in reversed(list(enumerate(IMAGES)))} | {"txt": b"", "0.txt": b""}
    assert find_images(files, "jpg;png") == IMAGES
    assert find_images(files, "jpg") == []
    assert find_images(files | {"png": IMAGES[3]}, "jpg;png") == [IMAGES[3]]
    assert find_images(files | {"png": IMAGES[3], "000.jpg": IMAGES[4]}, "jpg;png") == [IMAGES[4]]


def test_a_clip_is_its_frames_with_one_crop() -> None:
    clip = views_of({f"{index:03d}.png": image for index, image in enumerate(IMAGES)})
    still = dataclasses.replace(SPEC, frames=1)
    images = [views_of({"png": IMAGES[index]}, still) for index in spread(11, 4)]
    assert torch.equal(clip.images[0], torch.cat([image.images for image in images]))
    assert clip.images.shape == (1, 4, 3, 16, 16)
    assert views_of({f"{n}.png": IMAGES[n] for n in range(11)}, still).images.equal(
        views_of({"png": IMAGES[5]}, still).images
    )


def test_each_frame_has_patches_and_branches_of_its_own_and_the_first_those_of_an_image() -> None:
    clip, image = views_of({"png": IMAGES[0]}), views_of({"png": IMAGES[0]}, dataclasses.replace(SPEC, frames=1))
    for ours, theirs, shape in ((clip.kept, image.kept, (4, 8)), (clip.branch_scales, image.branch_scales, (4, 12, 2))):
        assert ours is not None and theirs is not None
        assert ours.shape == (1, *shape)
        assert ours[:, 0].equal(theirs)
        assert len({frame.numpy().tobytes() for frame in ours[0]}) == 4


def test_an_image_among_clips_stands_still() -> None:
    clip = views_of({"png": IMAGES[0]})
    assert all(torch.equal(frame, clip.images[0, 0]) for frame in clip.images[0])


def test_the_teacher_sees_the_same_frames() -> None:
    clip = views_of({f"{n}.png": IMAGES[n] for n in range(11)}, dataclasses.replace(SPEC, teacher_sizes=(16,)))
    (teacher_images,) = clip.teacher_images
    assert torch.equal(clip.images, teacher_images)


def test_a_damaged_frame_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="image cannot be decoded"):
        views_of({"0.png": IMAGES[0], "1.png": IMAGES[1][:40]})
    assert choose_frames([IMAGES[0], b"?", IMAGES[2]], 2)[1] == IMAGES[2]


def greys(data: bytes, frames: int) -> list[float]:
    return [float(np.median(frame[:, SIDE + 4 :])) for frame in decode_frames(data, frames)]


@pytest.mark.parametrize(
    ("format", "codec"), [("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libvpx-vp9"), ("avi", "mpeg4")]
)
def test_the_frames_of_a_video_are_those_in_the_middles_of_equal_parts(format: str, codec: str) -> None:
    data = write_video(30, format=format, codec=codec)
    assert is_video(data)
    # Frames are 8 apart, and the codecs keep a flat grey to 3.
    assert greys(data, 4) == pytest.approx([8 * index for index in spread(30, 4)], abs=3)
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


def test_a_video_is_a_clip_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
