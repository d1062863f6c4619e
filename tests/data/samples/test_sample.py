import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from tests.data.shard_files import encode, noise, smooth_photo
from w2s.data.samples.batch import require
from w2s.data.samples.captions import caption_hash
from w2s.data.samples.decode import decode_crop
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.samples.sample import SampleSpec, crop_box, draw_kept, draw_mask, make_sample, resize, sample_caption
from w2s.data.shards.raw_sample import BadSample, RawSample

SPEC = SampleSpec(
    image_size=64,
    grid=4,
    teacher_sizes=(128,),
    masked_patches=6,
    min_block=2,
    num_kept_patches=8,
    layers=12,
    drop_path=0.5,
    context_length=8,
)
RATIO = (3 / 4, 4 / 3)


def raw(**files: bytes) -> RawSample:
    return RawSample("key", "shard", files)


def photo() -> RawSample:
    return raw(jpg=encode(smooth_photo(), "JPEG", quality=95), txt=b" A photo\n")


def test_crops_equal_pillow_and_torchvision_within_2() -> None:
    spec = dataclasses.replace(SPEC, image_size=224, crop_scale=(0.9, 1.0), flip=False)
    image = Image.open(io.BytesIO(photo().files["jpg"]))
    for index in range(30):
        views = make_sample(photo(), spec, 3, index)
        box = crop_box(generator(3, Purpose.CROP, index), 400, 500, (0.9, 1.0), RATIO)
        for view, size in ((views.images, 224), (views.teacher_images[0], 128)):
            reference = tv.pil_to_tensor(tv.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC))
            assert (view[0].int() - reference.int()).abs().max() <= 2


def test_student_and_teacher_see_the_same_crop_and_flip() -> None:
    spec = dataclasses.replace(SPEC, teacher_sizes=(64,))
    flipped = 0
    for index in range(20):
        views = make_sample(photo(), spec, 0, index)
        (teacher_images,) = views.teacher_images
        assert torch.equal(views.images, teacher_images)
        plain = make_sample(photo(), dataclasses.replace(spec, flip=False), 0, index).images
        assert torch.equal(views.images, plain) or torch.equal(views.images, plain.flip(-1))
        flipped += not torch.equal(views.images, plain)
    assert 4 <= flipped <= 16


def test_everything_random_depends_on_seed_and_index() -> None:
    def fingerprint(seed: int, index: int) -> tuple[bytes, ...]:
        # The global generators must not matter.
        np.random.seed(index)
        torch.manual_seed(index + seed)
        views = make_sample(photo(), SPEC, seed, index)
        drawn = views.images, views.masks, views.kept, views.branch_scales
        return tuple(require(tensor).numpy().tobytes() for tensor in drawn)

    assert fingerprint(1, 7) == fingerprint(1, 7)
    others = [fingerprint(seed, index) for seed in (0, 1) for index in range(8)]
    assert [len({other[field] for other in others}) for field in range(4)] == [16, 16, 16, 16]


def test_only_what_is_asked_for_is_made() -> None:
    views = make_sample(raw(png=encode(noise(0))), SampleSpec(image_size=32, grid=4), 0, 0)
    assert views.images.shape == (1, 3, 32, 32)
    assert views.teacher_images == ()
    assert {views.masks, views.kept, views.branch_scales} == {None}
    assert sample_caption(raw(txt=b"a"), SampleSpec(image_size=32, grid=4), 0, 0) == ""


def test_boxes_follow_torchvisions_rule() -> None:
    height, width, scale = 300, 400, (0.2, 0.5)
    ours = [crop_box(generator(0, Purpose.CROP, i), height, width, scale, RATIO) for i in range(3000)]
    picture = torch.empty(1, height, width)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(picture, list(scale), list(RATIO)) for _ in range(3000)]
    # Means of 3,000 draws each: side lengths spread by about 30, positions by about 60, so 4 sigma is 4 and 7 pixels.
    difference = np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0))
    assert (difference < [7, 7, 4, 4]).all(), difference
    for top, left, crop_height, crop_width in ours:
        assert 0 <= top <= height - crop_height
        assert 0 <= left <= width - crop_width
        assert 0.19 < crop_height * crop_width / (height * width) < 0.51
        assert 0.73 < crop_width / crop_height < 1.36


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 1), (1, 50)])
def test_the_fallback_is_torchvisions(size: tuple[int, int]) -> None:
    box = crop_box(generator(0, Purpose.CROP, 0), *size, (0.9, 1.0), RATIO)
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), [0.9, 1.0], list(RATIO))
    assert box == tuple(int(value) for value in expected)


def test_resize_of_the_whole_image_at_its_size_changes_nothing() -> None:
    pixels = noise(1, 32, 32)
    assert np.array_equal(resize(pixels, 32, False).permute(1, 2, 0), pixels)
    assert np.array_equal(resize(pixels, 32, True).permute(1, 2, 0), pixels[:, ::-1])


def test_the_first_extension_that_is_there_is_taken() -> None:
    spec = SampleSpec(image_size=20, grid=1, image_key="webp;png", crop_scale=(1, 1), crop_ratio=(1, 1), flip=False)
    pixels = noise(1, 20, 20)
    views = make_sample(raw(jpg=b"no image", png=encode(pixels)), spec, 0, 0)
    assert np.array_equal(views.images[0].permute(1, 2, 0), pixels)


def test_a_sample_without_an_image_is_bad() -> None:
    with pytest.raises(BadSample, match="image is missing"):
        make_sample(raw(txt=b"a"), SPEC, 0, 0)


def test_caption_hashes_are_stable_63_bit_numbers() -> None:
    assert sample_caption(photo(), SPEC, 0, 0) == "A photo"
    assert caption_hash("A photo") == 3201417460435995062
    hashes = {caption_hash(f"caption {n}") for n in range(1000)}
    assert len(hashes) == 1000
    assert min(hashes) >= 0
    assert max(hashes) < 2**63


def test_half_scale_is_the_half_of_the_same_crop() -> None:
    """Half of the size by the transform of the JPEG is the mean of 2 x 2 pixels, up to what was rounded off."""
    pixels = smooth_photo(601, 803)
    data = encode(pixels, "JPEG", quality=95, subsampling=0)
    box = (40, 21, 452, 500)
    whole = decode_crop(data, lambda height, width: box)
    half = decode_crop(data, lambda height, width: box, half_from=448)
    assert whole.shape == (452, 500, 3)
    assert half.shape == (226, 250, 3)
    # The left edge is odd: the half begins one pixel of the whole further to the left, at 20.
    means = decode_crop(data, lambda height, width: (40, 20, 452, 500)).reshape(226, 2, 250, 2, 3).mean((1, 3))
    assert np.abs(means - half).mean() < 1
    assert decode_crop(data, lambda height, width: (0, 0, 447, 500), half_from=448).shape == (447, 500, 3)


def test_half_scale_is_used_only_where_the_crop_is_twice_the_view() -> None:
    raw_photo = raw(jpg=encode(smooth_photo(900, 1200), "JPEG"))
    for size, differs in ((224, True), (500, False)):
        spec = SampleSpec(image_size=size, grid=2, crop_scale=(0.9, 1.0), flip=False)
        whole = make_sample(raw_photo, spec, 0, 0).images
        half = make_sample(raw_photo, dataclasses.replace(spec, half_scale=True), 0, 0).images
        assert torch.equal(whole, half) != differs
        assert (whole.float() - half.float()).abs().mean() < 2


def test_uniform_masks_have_no_blocks_but_the_same_number() -> None:
    spec = SampleSpec(image_size=64, grid=16, masked_patches=105, min_block=16)
    uniform = dataclasses.replace(spec, uniform_mask=True)
    for index in range(50):
        assert draw_mask(spec, 1, index).sum() == draw_mask(uniform, 1, index).sum() == 105
    share = np.mean([draw_mask(uniform, 1, index) for index in range(2000)], axis=0)
    # 2,000 draws of probability 0.41: standard deviation 0.011, 256 places.
    assert np.abs(share - 105 / 256).max() < 0.055


def test_kept_patches_are_distinct_ascending_and_uniform() -> None:
    spec = SampleSpec(image_size=64, grid=4, num_kept_patches=8)
    draws = np.stack([draw_kept(spec, 0, index) for index in range(2000)])
    assert draws.dtype == np.int64
    assert (np.diff(draws, axis=1) > 0).all()
    assert np.bincount(draws.ravel(), minlength=16) / 2000 == pytest.approx(np.full(16, 0.5), abs=0.05)
