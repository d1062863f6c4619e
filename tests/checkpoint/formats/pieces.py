"""Exports of small CLIPs, and what their towers give."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoint.peers import captions, images, model_of, released, text_tower, timm_tower
from w2s.checkpoint.cast import Cast, numbers
from w2s.checkpoint.exporting import FORMATS
from w2s.checkpoint.files import InMemory
from w2s.checkpoint.formats.base import Export
from w2s.checkpoint.released import rename
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
    source = rename(InMemory(released(model) if tensors is None else tensors), Path("clip.pt"))
    out = folder / format
    out.mkdir(exist_ok=True)
    FORMATS[format](Export(Cast(source, numbers(precision)) if precision else source, model), out)
    return out


@torch.no_grad()
def features(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """What the towers give for `images` and `captions`."""
    return timm_tower(model)(images(model)), text_tower(model)(captions(model))
