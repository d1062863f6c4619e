"""A test set without its images: captions, classes and where each sample stands in its shards."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s.data.samples.captions import draw_caption
from w2s.data.samples.random_numbers import Purpose, generator
from w2s.data.shards.containers import read_shard
from w2s.data.shards.listing import list_shards, shard_folder
from w2s.data.shards.raw_sample import BadSample, RawSample, caption_file
from w2s.data.shards.storage import is_local, read_text
from w2s.errors import DataError

CLASS_NAMES = "classnames.txt"
PROMPTS = "zeroshot_classification_templates.txt"
SEVERAL_CLASSES = "npy"  # these three names are CLIP_benchmark's

_DIGITS = 19
"""Digits of a number that 64 bits hold no more."""

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""Gives what every rank has, in the order of the ranks."""


@dataclass
class EvalSet:
    """A test set of n images, which stay in their shards."""

    shards: list[str]
    """Its shards, in order."""
    locations: NDArray[np.int64]
    """Where each sample begins, [n, 2]: index of the shard and place in it."""
    captions: list[str]
    """One text an image, several captions on lines of their own; empty where the samples have none."""
    labels: Tensor | None
    """Numbers of the classes, int64 [n], or with several classes per image bool [n, classes]; None where an image has
    several captions and no class."""
    class_names: list[str]
    """Names by class number."""
    keys: list[str]
    """Names of the samples."""
    prompts: list[str] = field(default_factory=list)
    """Prompts with {c} in the place of a class name; empty where the set has no list of its own."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class _Entry:
    """What a sample has beside its image."""

    key: str
    start: int
    caption: str | None
    class_index: int | None
    several: NDArray[np.bool_] | None


def load_eval_set(
    shards: str,
    *,
    caption_key: str,
    class_key: str,
    option: str = "eval.shards",
    rank: int = 0,
    size: int = 1,
    gather: Gather = lambda local: [local],
) -> EvalSet:
    """Read all of a test set but its images, in the order of its shards and samples; each rank reads some shards.

    Class numbers come with names in `classnames.txt` beside the shards or in the folder above; without class numbers
    the distinct captions are the classes, in alphabetical order. Prompts are in
    `zeroshot_classification_templates.txt`, in the same places as the names. Where images have several classes, the
    file `npy` of a sample is an array with a number for each class, not zero where the image has it.

    Args:
        shards: what `list_shards` takes.
        caption_key: where the caption is: extensions or `json.KEY`, separated by `;`; the first that is there.
        class_key: extension of the class number.
        option: the configuration key to name in an error.
        rank: this process among those that call.
        size: number of these.
        gather: gives what every one of them has read.

    Raises:
        DataError: a shard, a caption, a class number or the class names are missing or cannot be read, or a prompt has
            no place for the name.
    """
    paths = list_shards(shards, option)
    parts = gather({path: _scan(path, caption_key, class_key) for path in paths[rank::size]})
    read = {path: entries for part in parts for path, entries in part.items()}
    entries = [entry for path in paths for entry in read[path]]
    if not entries:
        raise DataError(f"{option}={shards} has no samples: its shards are empty")
    locations = [(index, entry.start) for index, path in enumerate(paths) for entry in read[path]]
    keys = [entry.key for entry in entries]
    texts = _all_or_none([entry.caption for entry in entries], keys, f"caption .{caption_key}")
    classes = _all_or_none([entry.class_index for entry in entries], keys, f"class number .{class_key}")
    several = _all_or_none([entry.several for entry in entries], keys, f"classes .{SEVERAL_CLASSES}")
    labels: Tensor | None
    if classes:
        labels, names = _named_classes(classes, paths[0])
    elif several:
        labels, names = _several_classes(several, paths[0])
    else:
        labels, names = _caption_classes(texts, f"{option}={shards}")
    return EvalSet(paths, np.array(locations), texts, labels, names, keys, _prompts(paths[0]))


def _scan(shard: str, caption_key: str, class_key: str) -> list[_Entry]:
    """The samples of a shard, of which no image is read."""
    wanted = {class_key, SEVERAL_CLASSES, *(caption_file(key) for key in caption_key.split(";"))}
    entries, start = [], 0
    for sample in read_shard(shard, wanted=wanted):
        if sample.damage:
            raise DataError(f"{shard}: {sample.key}: {sample.damage}, repair the test set")
        caption, class_index = _caption(sample, caption_key), _class_number(sample, class_key)
        entries.append(_Entry(sample.key, start, caption, class_index, _classes(sample)))
        start = sample.end
    return entries


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


def _classes(sample: RawSample) -> NDArray[np.bool_] | None:
    data = sample.files.get(SEVERAL_CLASSES)
    if data is None:
        return None
    try:
        marks = np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
        if marks.ndim != 1 or not (np.issubdtype(marks.dtype, np.number) or marks.dtype == np.bool_):
            raise ValueError("not a row of numbers")
    except (ValueError, OSError, EOFError) as error:
        where = f"{sample.shard}: {sample.key}.{SEVERAL_CLASSES}"
        raise DataError(f"{where} is not an array with a number for each class: repair the test set") from error
    return marks != 0


def _all_or_none(values: Sequence[T | None], keys: list[str], what: str) -> list[T]:
    """The values if all samples have one, nothing if none has."""
    present = [value for value in values if value is not None]
    if present and len(present) < len(values):
        missing = next(key for key, value in zip(keys, values, strict=True) if value is None)
        raise DataError(f"{missing} has no {what}, other samples do: repair the test set")
    return present


def _names(shard: str) -> tuple[str, list[str]]:
    file, names = _beside(shard, CLASS_NAMES)
    if not file:
        missing = f"{shard_folder(shard)}{CLASS_NAMES}"
        raise DataError(f"{missing} does not exist: write the classes' names into it, one a line")
    return file, names


def _named_classes(class_indices: list[int], shard: str) -> tuple[Tensor, list[str]]:
    file, names = _names(shard)
    if max(class_indices) >= len(names):
        raise DataError(
            f"{file} has {len(names)} names but there is a class number {max(class_indices)}: add the names"
        )
    return torch.tensor(class_indices), names


def _several_classes(marks: list[NDArray[np.bool_]], shard: str) -> tuple[Tensor, list[str]]:
    file, names = _names(shard)
    wrong = next((len(row) for row in marks if len(row) != len(names)), None)
    if wrong is not None:
        raise DataError(
            f"{file} has {len(names)} names but there is an image with {wrong} classes: repair the test set"
        )
    return torch.from_numpy(np.stack(marks)), names


def _prompts(shard: str) -> list[str]:
    file, prompts = _beside(shard, PROMPTS)
    wrong = next((prompt for prompt in prompts if "{c}" not in prompt), None)
    if wrong is not None:
        raise DataError(f"{file}: '{wrong}' has no {{c}} in the place of the class name: write it, and no empty line")
    return prompts


def _beside(shard: str, name: str) -> tuple[str, list[str]]:
    """A file in the folder of a shard, or in the folder above, and its lines; an empty path where there is none."""
    if not is_local(shard):
        folder = shard_folder(shard)
        for place in (folder, shard_folder(folder.removesuffix("/"))):
            text = read_text(f"{place}{name}")
            if text is not None:
                return f"{place}{name}", text.splitlines()
        return "", []
    parent = Path(shard.removeprefix("file://")).parent
    file = next((place / name for place in (parent, parent.parent) if (place / name).is_file()), None)
    try:
        return ("", []) if file is None else (str(file), file.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: repair it") from error


def _caption_classes(captions: list[str], source: str) -> tuple[Tensor | None, list[str]]:
    if not captions:
        raise DataError(f"{source} has neither class numbers nor captions: set eval.class_key or data.caption_key")
    if any("\n" in caption for caption in captions):
        return None, []
    names = sorted(set(captions))
    class_indices = {name: class_index for class_index, name in enumerate(names)}
    return torch.tensor([class_indices[caption] for caption in captions]), names
