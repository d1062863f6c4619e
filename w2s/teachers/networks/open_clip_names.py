"""What open_clip says of a model: by its name, or in a folder that describes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from w2s.errors import CheckpointError
from w2s.teachers.networks.teacher_weights import LOCAL, unknown_model


class Described(NamedTuple):
    """A model in open_clip's words."""

    config: dict[str, Any]
    """`embed_dim`, `vision_cfg`, `text_cfg` and what else its configuration has."""
    mean: Sequence[float]
    std: Sequence[float]


def described(name: str) -> Described:
    """The description of `name`, which is a model or `local-dir:FOLDER`.

    Raises:
        ConfigError: open_clip has no such model.
        CheckpointError: the folder is none of open_clip's; with the source that suits it.
    """
    if name.startswith(LOCAL):
        return _in_folder(Path(name.removeprefix(LOCAL)))
    known = open_clip.list_models()
    if name not in known:
        raise unknown_model("open_clip", name, known)
    # the preprocessing of the first published weights
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    return _with_preprocessing(open_clip.get_model_config(name), published)


def _in_folder(folder: Path) -> Described:
    path = folder / "open_clip_config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = content["model_cfg"]
        vision = config["vision_cfg"]
    except (OSError, ValueError, KeyError) as error:
        other = f"use hf:{folder}" if (folder / "config.json").is_file() else "give a folder of open_clip"
        raise CheckpointError(f"teacher.source: {path} cannot be read: {other}") from error
    if ":" in vision.get("timm_model_name", ""):
        vision["timm_model_name"] = _tower_in(folder, vision["timm_model_name"])
    return _with_preprocessing(config, content.get("preprocess_cfg") or {})


def _tower_in(folder: Path, name: str) -> str:
    """What timm builds a tower from that it has no name for: the description in the folder, wherever that is now."""
    for place in (folder / Path(name).name, folder, Path(name.removeprefix(LOCAL))):
        if (place / "config.json").is_file():
            return f"{LOCAL}{place}"
    raise CheckpointError(f"teacher.source: {folder} names its tower {name}, put that one's config.json into {folder}")


def _with_preprocessing(config: dict[str, Any], preprocessing: dict[str, Any]) -> Described:
    mean = preprocessing.get("mean") or open_clip.OPENAI_DATASET_MEAN
    return Described(config, mean, preprocessing.get("std") or open_clip.OPENAI_DATASET_STD)
