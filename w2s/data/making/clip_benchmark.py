"""Test sets in the layout of CLIP_benchmark's webdatasets: `w2s data make --layout clip_benchmark`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from w2s.config.fields import nearest
from w2s.config.rules import require
from w2s.errors import ConfigError, DataError, MissingPackageError

_IMAGENET = "imagenet1k"
_OF_IMAGENET = ("imagenet", "objectnet")
"""How the names of sets begin that have ImageNet's classes and prompts."""
_SPLITS = ("test", "train")
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkSet:
    """A split of a test set: its shards are SPLIT/0.tar, SPLIT/1.tar, ..., what is known of them lies beside SPLIT."""

    split: str
    """Name of the split: `test`, or `train` for k-NN and the linear probe."""
    like: str = ""
    """Set of CLIP_benchmark whose class names and prompts are taken from its package, such as `vtab/pets`."""
    prompts: Sequence[str] = field(default=())
    """Prompts with {c} in the place of the class name, in place of that set's."""

    def __post_init__(self) -> None:
        require(self.split in _SPLITS, f"--split {self.split}: use {' or '.join(_SPLITS)}")

    def class_names(self, folders: Sequence[str]) -> list[str]:
        """Return the names of the classes, by what the source calls them.

        Of ImageNet's numbers (n01440764) they are open_clip's, in whichever part of its classes. Of another set that
        `like` names they are CLIP_benchmark's where it has a list, otherwise the source's with spaces for _ and /.

        Raises:
            DataError: there is another number of them.
            MissingPackageError: CLIP_benchmark is not installed.
        """
        if folders and all(map(_SYNSET.fullmatch, folders)):
            return _of_imagenet(folders)
        if not self.like:
            return list(folders)
        names: list[str] | None = _of_benchmark(self.like, "en_classnames.json").get(_key(self.like))
        if names is None:
            return [re.sub("[_/]", " ", folder) for folder in folders]
        if len(names) != len(folders):
            raise DataError(f"--like {self.like} has {len(names)} classes, the source has {len(folders)}: compare them")
        return names

    def find_prompts(self) -> list[str]:
        """Return the prompts; CLIP_benchmark has ImageNet's for sets without own ones.

        Raises:
            ConfigError: one has no place for the name, or CLIP_benchmark knows no set that `like` names.
            MissingPackageError: CLIP_benchmark is not installed.
        """
        wrong = next((prompt for prompt in self.prompts if "{c}" not in prompt), None)
        if wrong is not None:
            raise ConfigError(f"--prompt '{wrong}' has no {{c}} in the place of the class name: write it")
        if self.prompts or not self.like:
            return list(self.prompts)
        known = _of_benchmark(self.like, "en_zeroshot_classification_templates.json")
        named, key = {*known, *_of_benchmark(self.like, "en_classnames.json")}, _key(self.like)
        if key not in named and not key.startswith(_OF_IMAGENET):
            raise ConfigError(
                f"--like {self.like} is not a set of CLIP_benchmark: did you mean {nearest(key, sorted(named))}?"
            )
        return known.get(key, known[_IMAGENET])


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a key that sorts numbers in names by their size."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts)


def describe(out: Path, split: str, *, shards: int, names: Sequence[str], prompts: Sequence[str], kind: str) -> None:
    """Write what CLIP_benchmark wants to know of a test set.

    Args:
        out: the set's folder.
        split: name of the split.
        shards: number of its shards.
        names: of the classes, by number; empty without classes.
        prompts: for these; empty without.
        kind: `multilabel`, `retrieval`, or empty for one class per image.

    Raises:
        DataError: another split has other class names.
    """
    about = {"classnames.txt": names, "zeroshot_classification_templates.txt": prompts if names else []}
    about["dataset_type.txt"] = [kind] if kind else []
    (out / split / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    for name, lines in about.items():
        text = "".join(f"{line}\n" for line in lines)
        if name == "classnames.txt" and (out / name).is_file() and (out / name).read_text(encoding="utf-8") != text:
            raise DataError(f"{out / name} has other classes than this split: choose another folder")
        if lines:
            (out / name).write_text(text, encoding="utf-8")


def _of_imagenet(synsets: Sequence[str]) -> list[str]:
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    names = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    unknown = next((synset for synset in synsets if synset not in names), None)
    if unknown is not None:
        raise DataError(f"{unknown} is none of ImageNet's 1,000 classes: rename the folder, or leave it out")
    return [names[synset] for synset in synsets]


def _of_benchmark(like: str, file: str) -> Mapping[str, list[str]]:
    try:
        text = (files("clip_benchmark.datasets") / file).read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"--like {like} takes names and prompts from CLIP_benchmark, which is not installed: "
            "pip install 'w2s[benchmark]', or give --prompt"
        ) from error
    known: dict[str, list[str]] = json.loads(text)
    return known


def _key(like: str) -> str:
    return like.rpartition("/")[2]
