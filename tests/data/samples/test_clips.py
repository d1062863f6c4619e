import dataclasses

import pytest
import torch

from tests.data.shard_files import encode, noise
from w2s.data.samples.batch import Batch
from w2s.data.samples.frames import choose_frames, spread
from w2s.data.samples.sample import SampleSpec, make_sample
from w2s.data.shards.raw_sample import BadSample, RawSample, find_images

SPEC = SampleSpec(image_size=16, grid=4, num_kept_patches=8, layers=12, drop_path=0.5, frames=4)
IMAGES = [encode(noise(number)) for number in range(11)]


def views_of(files: dict[str, bytes], spec: SampleSpec = SPEC) -> Batch:
    return make_sample(RawSample("key", "shard", files), spec, 3, 5)


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert spread(9, 1) == [4]  # the middle frame
    assert spread(16, 8) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert spread(300, 4) == [37, 112, 187, 262]
    assert spread(3, 6) == [0, 0, 1, 1, 2, 2]
    assert spread(1, 3) == [0, 0, 0]


def test_numbered_images_are_frames_in_the_order_of_their_numbers() -> None:
    files = {f"{number}.png": image for number, image in reversed(list(enumerate(IMAGES)))} | {"txt": b"", "0.txt": b""}
    assert find_images(files, "jpg;png") == IMAGES
    assert find_images(files, "jpg") == []
    assert find_images(files | {"png": IMAGES[3]}, "jpg;png") == [IMAGES[3]]
    assert find_images(files | {"png": IMAGES[3], "000.jpg": IMAGES[4]}, "jpg;png") == [IMAGES[4]]


def test_a_clip_is_its_frames_with_one_crop() -> None:
    clip = views_of({f"{number:03d}.png": image for number, image in enumerate(IMAGES)})
    still = dataclasses.replace(SPEC, frames=1)
    images = [views_of({"png": IMAGES[number]}, still) for number in spread(11, 4)]
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
