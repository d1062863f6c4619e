"""One raw sample to what a stage trains on. Everything random depends on the global sample index alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from w2s.config.sections import Config, DataConfig
from w2s.data.samples.batch import Batch
from w2s.data.samples.captions import draw_caption
from w2s.data.samples.decode import decode_crop
from w2s.data.samples.drop_path import branch_scales
from w2s.data.samples.frames import Picture, choose_frames
from w2s.data.samples.masks import block_mask
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.shards.raw_sample import BadSample, RawSample, caption_file, find_images

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """What a stage wants of every sample."""

    image_size: int
    """Side of the student's view in pixels."""
    frames: int = 1
    """Frames of a clip that are seen; with more than one every sample is a clip, and an image one of equal frames."""
    grid: int
    """Patches along one side of the student's view."""
    teacher_sizes: tuple[int, ...] = ()
    """Sides of the teachers' views in pixels, each once."""
    teacher_samples: int | None = None
    """Samples of the run, from its first, that have the teachers' views; None for all."""
    masked_patches: int = 0
    """Patches masked in every image; 0 makes no masks."""
    min_block: int = 1
    """Smallest masked block in patches."""
    block_aspect: float = 0.3
    """Masked blocks have an aspect ratio between this and its inverse."""
    uniform_mask: bool = False
    """Mask patches anywhere instead of in blocks."""
    num_kept_patches: int = 0
    """Patches that patch dropout keeps; 0 keeps all and lists none."""
    layers: int = 0
    """Layers of the student."""
    drop_path: float = 0.0
    """Probability that drop path leaves out a branch of the last layer; 0 scales no branches."""
    context_length: int = 0
    """Tokens of a caption; 0 reads no captions."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop."""
    flip: bool = True
    """Flip half of the images left to right."""
    half_scale: bool = False
    """Decode a JPEG at half its size where the crop is at least twice the larger view."""
    image_key: str = DataConfig.image_key
    """Extensions of the image; the first that is there is taken."""
    caption_key: str = DataConfig.caption_key
    """Where the caption is: extensions or `json.KEY`, separated by `;`."""
    caption_weights: tuple[float, ...] = ()
    """Probability of each of these; empty takes the first that is there."""

    @classmethod
    def of(cls, config: Config, **views: Any) -> "SampleSpec":
        """Return the spec of a run's student and data; `views` are the fields that its stage wants beside the image."""
        vision, data = config.model.vision, config.data
        return cls(
            image_size=vision.image_size,
            frames=data.frames,
            grid=vision.grid,
            layers=vision.layers,
            drop_path=vision.drop_path,
            crop_scale=data.crop_scale,
            crop_ratio=data.crop_ratio,
            flip=data.flip,
            half_scale=data.half_scale,
            image_key=data.image_key,
            caption_key=data.caption_key,
            caption_weights=tuple(data.caption_weights),
            **views,
        )

    @property
    def extensions(self) -> frozenset[str]:
        """Extensions of the files that are needed of a sample."""
        captions = {caption_file(key) for key in self.caption_key.split(";")} if self.context_length else set()
        return frozenset(self.image_key.split(";")) | captions


def sample_caption(raw: RawSample, spec: SampleSpec, seed: int, index: int) -> str:
    """Draw the caption of a sample, empty where the stage wants none; arguments as of `make_sample`.

    Raises:
        BadSample: the caption is missing or unreadable.
    """
    if not spec.context_length:
        return ""
    return draw_caption(raw, spec.caption_key, spec.caption_weights, generator(seed, Purpose.CAPTION, index))


def make_sample(raw: RawSample, spec: SampleSpec, seed: int, index: int) -> Batch:
    """Decode a sample and draw its crop, flip, mask, kept patches and branch scales: a batch of one, without tokens.

    The student's and the teachers' views show the same crop with the same flip, and so do the frames of a clip.

    Args:
        raw: the undecoded sample.
        spec: what the stage wants.
        seed: seed of the run.
        index: global sample index; with the seed it fixes everything that is random.

    Raises:
        BadSample: the image is missing or unreadable.
    """
    images = find_images(raw.files, spec.image_key)
    if not images:
        raise BadSample("image is missing")
    has_teachers = spec.teacher_samples is None or index < spec.teacher_samples
    sizes = [spec.image_size, *(spec.teacher_sizes if has_teachers else ())]
    frames = [_views(picture, sizes, spec, seed, index) for picture in choose_frames(images, spec.frames)]
    views = [(torch.stack(view) if spec.frames > 1 else view[0])[None] for view in zip(*frames, strict=True)]
    return Batch(
        images=views[0],
        teacher_images=tuple(views[1:]),
        masks=_row(draw_mask(spec, seed, index)) if spec.masked_patches else None,
        kept=_row(draw_kept(spec, seed, index)) if spec.num_kept_patches else None,
        branch_scales=_row(draw_branches(spec, seed, index)) if spec.drop_path else None,
        keys=[raw.key],
        indices=torch.tensor([index]),
    )


def _row(drawn: NDArray[T]) -> torch.Tensor:
    """What is drawn for a sample, as the only row of a batch."""
    return torch.from_numpy(drawn)[None]


def _views(picture: Picture, sizes: Sequence[int], spec: SampleSpec, seed: int, index: int) -> list[torch.Tensor]:
    """A picture's crop at each of some sizes; of equally large pictures of a sample it is the same crop."""
    rng = generator(seed, Purpose.CROP, index)
    crop = decode_crop(
        picture,
        lambda height, width: crop_box(rng, height, width, spec.crop_scale, spec.crop_ratio),
        half_from=2 * max(sizes) if spec.half_scale else None,
    )
    flip = spec.flip and rng.random() < 0.5
    return [resize(crop, size, flip) for size in sizes]


def draw_mask(spec: SampleSpec, seed: int, index: int) -> NDArray[np.bool_]:
    """Draw the mask of a sample: bool [grid * grid], row by row, with exactly `masked_patches` masked."""
    rng = generator(seed, Purpose.MASK, index)
    if spec.uniform_mask:  # each place equally likely
        return rng.permutation(spec.grid**2) < spec.masked_patches
    return block_mask(rng, spec.grid, spec.masked_patches, spec.min_block, spec.block_aspect)


def draw_kept(spec: SampleSpec, seed: int, index: int) -> NDArray[np.int64]:
    """Draw the patches that patch dropout keeps of each image or frame, ascending: int64 [num_kept_patches]."""

    def draw(frame: int) -> NDArray[np.int64]:
        return np.sort(
            generator(seed, Purpose.PATCHES, index, frame).permutation(spec.grid**2)[: spec.num_kept_patches]
        )

    return _of_frames(spec, draw)


def draw_branches(spec: SampleSpec, seed: int, index: int) -> NDArray[np.float32]:
    """Draw the scales of branches under drop path: float32 [layers, 2], for each frame of a clip its own."""
    return _of_frames(
        spec, lambda frame: branch_scales(generator(seed, Purpose.BRANCHES, index, frame), spec.layers, spec.drop_path)
    )


def _of_frames(spec: SampleSpec, draw: Callable[[int], NDArray[T]]) -> NDArray[T]:
    """What is drawn for an image, or for each frame of a clip."""
    return draw(0) if spec.frames == 1 else np.stack([draw(frame) for frame in range(spec.frames)])


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a crop by torchvision's RandomResizedCrop rule.

    Ten tries with an area uniform in `scale` and an aspect ratio log-uniform in `ratio`; if none fits, the largest
    centred crop whose aspect ratio is allowed.

    Returns:
        top, left, height, width in pixels.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            return int(top), int(left), crop_height, crop_width
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize(crop: NDArray[np.uint8], size: int, flip: bool) -> torch.Tensor:
    """Resize a crop to a square with antialiased bicubic interpolation.

    Args:
        crop: uint8 [height, width, 3].
        size: side of the result in pixels.
        flip: mirror it left to right.

    Returns:
        uint8 [3, size, size].
    """
    # A channels-last view takes torch's uint8 kernel, which does Pillow's arithmetic three times as fast as Pillow.
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]
    view = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)[0]
    return (view.flip(-1) if flip else view).contiguous()
