"""Exports of small CLIPs, and what their towers give."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoint.peers import captions, images, model_of, released, text_tower, timm_tower
from w2s.checkpoint.export.cast import cast
from w2s.checkpoint.export.exporting import FORMATS
from w2s.checkpoint.export.formats.base import Export, Guide
from w2s.checkpoint.weights.released import rename
from w2s.checkpoint.weights.tensor_files import InMemory
from w2s.config.sections import ModelConfig


def small(kind: str, **vision: Any) -> ModelConfig:
    """A CLIP of a kind that reads the tokens of the real tokenizer."""
    model = model_of(kind)
    text = replace(model.text, vocab_size=49408, context_length=16)
    return replace(model, vision=replace(model.vision, **vision), text=text)


def write(
    model: ModelConfig, format: str, folder: Path, tensors: dict[str, Tensor] | None = None, precision: str = ""
) -> Path:
    """Write random weights of a CLIP, or those given, in a format."""
    return write_guided(model, format, folder, tensors, precision)[0]


def write_guided(
    model: ModelConfig, format: str, folder: Path, tensors: dict[str, Tensor] | None = None, precision: str = ""
) -> tuple[Path, Guide]:
    """The same, with what the card says of it."""
    source = rename(InMemory(released(model) if tensors is None else tensors), Path("clip.pt"))
    out = folder / format
    out.mkdir(exist_ok=True)
    return out, FORMATS[format](Export(cast(source, precision) if precision else source, model), out)


def run_snippets(folder: Path, guide: Guide) -> list[dict[str, Any]]:
    """Run what the card says of a folder, on an image; return the variables that each leaves."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 70, 3), dtype=np.uint8))
    left: list[dict[str, Any]] = []
    for snippet in guide.snippets:
        left.append({"image": image})
        exec(snippet.code.replace("FOLDER", str(folder)), left[-1])
    return left


@torch.no_grad()
def features(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """What the towers give for `images` and `captions`."""
    return timm_tower(model)(images(model)), text_tower(model)(captions(model))
