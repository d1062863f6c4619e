"""What every format is given, what it says of the folder that it has written, and how files are written there."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w2s.checkpoint.export.weight_files import write_safetensors
from w2s.checkpoint.weights.released import Released
from w2s.checkpoint.weights.views import Source, View
from w2s.config.sections import ModelConfig

EMBEDS_BOTH = "zero-shot-image-classification"
EMBEDS_IMAGES = "image-feature-extraction"
"""What the hub calls the task of a CLIP, and of a vision tower."""
RESIZED = (
    "Its own preprocessing resizes some images to pixels that differ by 1/255 from those of w2s, and features by some "
    "1e-5 with them."
)
"""A limit of peers that resize with torchvision or PIL."""


@dataclass(frozen=True)
class Export:
    """What a format writes."""

    released: Released
    """The weights."""
    model: ModelConfig
    """Their shape."""
    hub: str = ""
    """OWNER/NAME that the folder will have on a hub; empty where none is said."""


@dataclass(frozen=True)
class Snippet:
    """How to load a folder with one peer."""

    peer: str
    """Who loads it, and where from where that matters."""
    code: str
    """A few lines; FOLDER stands for the folder."""
    language: str = "python"
    """What they are written in."""


@dataclass(frozen=True)
class Guide:
    """What the card says of a format."""

    library: str
    """What the hub calls the library that loads it."""
    task: str
    """What the hub calls its task."""
    snippets: Sequence[Snippet]
    """How to load it; the first one does where it lies, wherever that is."""
    limits: Sequence[str] = ()
    """What it cannot do, a sentence each."""
    vision_alone: bool = False
    """Whether it holds the vision tower and nothing else."""
    comes_back: bool = True
    """Whether `w2s import` reads it."""


Write = Callable[[Export, Path], Guide]
"""Writes a format into a folder that is there."""


def write_weights(path: Path, export: Export, sources: Mapping[str, Source]) -> None:
    """Write a safetensors file of what is made out of the released tensors, by the name that it has there."""
    write_safetensors(path, View(export.released, sources), {"model": export.model.name})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the number that times `width`, rounded down, gives `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
