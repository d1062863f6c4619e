"""A test set in memory: images, captions and classes, read from webdataset shards in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from w2s.config.sections import Resize
from w2s.data.bad import BadSample
from w2s.data.captions import draw_caption
from w2s.data.clips import choose_frames, find_images
from w2s.data.containers import read_shard
from w2s.data.counter import Purpose, generator
from w2s.data.decode import decode_image
from w2s.data.samples import RawSample, caption_file
from w2s.data.shards import list_shards
from w2s.data.video import is_video
from w2s.errors import DataError

CLASS_NAMES = "classnames.txt"
PROMPTS = "zeroshot_classification_templates.txt"  # both names are CLIP_benchmark's

_DIGITS = 19
"""Digits of a number that 64 bits hold no more."""

T = TypeVar("T")


@dataclass
class EvalSet:
    """A test set of n images or clips of S x S pixels."""

    images: Tensor
    """uint8 [n, 3, S, S], or [n, frames, 3, S, S]."""
    captions: list[str]
    """One text an image, several captions on lines of their own; empty where the samples have none."""
    labels: Tensor | None
    """int64 [n], numbers of the classes; None where an image has several captions and no class."""
    class_names: list[str]
    """Names by class number."""
    keys: list[str]
    """Names of the samples."""
    prompts: list[str] = field(default_factory=list)
    """Prompts with {c} in the place of a class name; empty where the set has no list of its own."""


def load_eval_set(
    shards: str,
    image_size: int,
    *,
    how: Resize,
    image_key: str,
    caption_key: str,
    class_key: str,
    frames: int = 1,
    option: str = "eval.shards",
) -> EvalSet:
    """Read a test set, in the order of its shards and samples.

    Class numbers come with names in `classnames.txt` beside the shards or in the folder above; without class numbers
    the distinct captions are the classes, in alphabetical order. Prompts are in
    `zeroshot_classification_templates.txt`, in the same places as the names.

    Args:
        shards: what `list_shards` takes.
        image_size: side of the images in pixels, S.
        how: how an image becomes square, see `eval_transform`.
        image_key: extensions of the image, separated by `;`.
        caption_key: where the caption is: extensions or `json.KEY`, separated by `;`; the first that is there.
        class_key: extension of the class number.
        frames: frames of a clip that are seen.
        option: the configuration key to name in an error.

    Raises:
        DataError: a shard, an image, a caption, a class number or the class names are missing or cannot be read, or a
            prompt has no place for the name.
    """
    paths = list_shards(shards, option)
    images, captions, numbers, keys = [], [], [], []
    for sample in (sample for path in paths for sample in read_shard(path)):
        images.append(_image(sample, image_size, how, image_key, frames))
        captions.append(_caption(sample, caption_key))
        numbers.append(_class_number(sample, class_key))
        keys.append(sample.key)
    texts = _all_or_none(captions, keys, f"caption .{caption_key}")
    classes = _all_or_none(numbers, keys, f"class number .{class_key}")
    folder = Path(paths[0]).parent
    labels, names = _named_classes(classes, folder) if classes else _caption_classes(texts, f"{option}={shards}")
    return EvalSet(torch.stack(images), texts, labels, names, keys, _prompts(folder))


def eval_transform(pixels: Tensor, image_size: int, how: Resize) -> Tensor:
    """CLIP's test transform of an image to a square: an antialiased bicubic resize.

    Args:
        pixels: uint8 [3, height, width].
        image_size: side of the square in pixels, S.
        how: `crop` resizes the shorter side to S and takes the centre, `squash` both sides (EVA-CLIP-18B, section 7).

    Returns:
        uint8 [3, S, S].
    """
    square = [image_size, image_size]
    size = square if how == "squash" else [image_size]
    return center_crop(resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True), square)


def view(images: Sequence[bytes], frames: int, image_size: int, how: Resize) -> Tensor:
    """Decode the image or the clip of a sample, and make it square as `eval_transform` does.

    Args:
        images: what `find_images` has found.
        frames: frames of a clip that are seen; an image is a clip that stands still.
        image_size: side of the square in pixels, S.
        how: see `eval_transform`.

    Returns:
        uint8 [3, S, S], or with several frames [frames, 3, S, S].

    Raises:
        BadSample: an image is damaged or too large, or a video too long.
    """
    still = len(images) == 1 and not is_video(images[0])
    views = [
        eval_transform(torch.from_numpy(decode_image(picture)).permute(2, 0, 1), image_size, how)
        for picture in choose_frames(images, 1 if still else frames)
    ]
    return views[0] if frames == 1 else torch.stack(views).expand(frames, -1, -1, -1)


def stills(images: Tensor) -> Tensor:
    """Return images as they are, and the middle frames of clips: uint8 [n, 3, S, S]."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def _image(sample: RawSample, image_size: int, how: Resize, image_key: str, frames: int) -> Tensor:
    images = find_images(sample.files, image_key)
    if not images:
        reason = sample.damage or f"no image .{image_key}"
        raise DataError(f"{sample.shard}: {sample.key}: {reason}, repair the test set")
    try:
        return view(images, frames, image_size, how)
    except BadSample as error:
        raise DataError(f"{sample.shard}: {sample.key}: {error}, repair the test set") from error


def _caption(sample: RawSample, caption_key: str) -> str | None:
    if not any(caption_file(key) in sample.files for key in caption_key.split(";")):
        return None
    try:
        return draw_caption(sample, caption_key, (), generator(0, Purpose.CAPTION, 0))
    except BadSample as error:
        raise DataError(f"{sample.shard}: {sample.key}: {error}, repair the test set") from error


def _text(sample: RawSample, key: str) -> str | None:
    data = sample.files.get(key)
    if data is None:
        return None
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{sample.shard}: {sample.key}.{key} is not UTF-8 text: repair the test set") from error


def _class_number(sample: RawSample, key: str) -> int | None:
    text = _text(sample, key)
    if text is None or (text.isdecimal() and len(text) < _DIGITS):
        return None if text is None else int(text)
    raise DataError(f"{sample.shard}: {sample.key}.{key} is '{text[:20]}', not a class number: repair the test set")


def _all_or_none(values: list[T | None], keys: list[str], what: str) -> list[T]:
    """The values if all samples have one, nothing if none has."""
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        raise DataError(f"{keys[values.index(None)]} has no {what}, other samples do: repair the test set")
    return present


def _named_classes(numbers: list[int], folder: Path) -> tuple[Tensor, list[str]]:
    file = _beside(folder, CLASS_NAMES)
    if file is None:
        raise DataError(f"{folder / CLASS_NAMES} does not exist: write the classes' names into it, one a line")
    names = _lines(file)
    if max(numbers) >= len(names):
        raise DataError(f"{file} has {len(names)} names but there is a class number {max(numbers)}: add the names")
    return torch.tensor(numbers), names


def _prompts(folder: Path) -> list[str]:
    file = _beside(folder, PROMPTS)
    prompts = _lines(file) if file else []
    wrong = next((prompt for prompt in prompts if "{c}" not in prompt), None)
    if wrong is not None:
        raise DataError(f"{file}: '{wrong}' has no {{c}} in the place of the class name: write it, and no empty line")
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: repair it") from error


def _beside(folder: Path, name: str) -> Path | None:
    """A file in the folder of the shards, or in the folder above."""
    return next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)


def _caption_classes(captions: list[str], source: str) -> tuple[Tensor | None, list[str]]:
    if not captions:
        raise DataError(f"{source} has neither class numbers nor captions: set eval.class_key or data.caption_key")
    if any("\n" in caption for caption in captions):
        return None, []
    names = sorted(set(captions))
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[caption] for caption in captions]), names
