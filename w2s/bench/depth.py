"""A stage at full width and reduced depth, with a teacher that needs no weights."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import yaml

from w2s.config.load import named_model
from w2s.config.sections import Config, TeacherConfig, TeacherEntry
from w2s.errors import ConfigError

T = TypeVar("T", TeacherConfig, TeacherEntry)
_RANDOM = ("eva", "timm", "open_clip")
"""Kinds of teachers that can do without weights."""


def reduced(config: Config, layers: int | None, folder: Path) -> Config:
    """Return the configuration of a benchmark.

    The text tower and a teacher of `configs/model` become as much shallower as the vision tower, so that their shares
    of a step stay what they are. A teacher of EVA, timm or open_clip gets random weights: its speed is the same.

    Args:
        config: a training stage.
        layers: layers of the vision tower; None leaves every depth as it is.
        folder: where the description of a shallower teacher is kept for as long as the benchmark lasts.

    Raises:
        ConfigError: the vision tower has fewer layers.
    """
    vision, text = config.model.vision, config.model.text
    layers = vision.layers if layers is None else layers
    if layers > vision.layers:
        raise ConfigError(f"--layers {layers}: the vision tower has {vision.layers} layers, use at most as many")
    fraction = layers / vision.layers
    model = replace(
        config.model, vision=replace(vision, layers=layers), text=replace(text, layers=_part(text.layers, fraction))
    )
    distills = config.stage == "clip" and bool(config.stage_teachers)
    teacher = _teacher(config.stage_teachers[0] if distills else config.teacher, fraction, folder)
    teachers = replace(config.teachers, of=[_teacher(each, fraction, folder) for each in config.teachers.of])
    clip = config.clip
    if distills:
        # There in every step, and shallower as described.
        clip = replace(clip, distill=replace(clip.distill, source="teacher", until=1.0, until_better=False))
    return replace(config, model=model, teacher=teacher, teachers=teachers, clip=clip)


def _part(layers: int, fraction: float) -> int:
    return max(1, round(layers * fraction))


def _teacher(teacher: T, fraction: float, folder: Path) -> T:
    kind, _, rest = teacher.source.partition(":")
    if kind not in _RANDOM:
        return teacher
    name = rest.partition("@")[0]
    if kind == "eva" and fraction < 1:
        name = _shallower(name, fraction, folder)
    return replace(teacher, source=f"{kind}:{name}")


def _shallower(name: str, fraction: float, folder: Path) -> str:
    """Describe a model with fewer layers; return the path of the description."""
    model = named_model(name)
    vision = replace(model.vision, layers=_part(model.vision.layers, fraction))
    text = replace(model.text, layers=_part(model.text.layers, fraction))
    path = folder / f"{Path(name).stem}.yaml"
    path.write_text(yaml.safe_dump({"model": asdict(replace(model, vision=vision, text=text))}), encoding="utf-8")
    return str(path)
