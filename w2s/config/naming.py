"""Where a run lives: its folder, and the digest by which a repeated command finds it again."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w2s.config.sections import Config

_WITHOUT_EFFECT = frozenset(
    {
        "run.root",
        "run.name",
        "run.group",
        "model.name",
        "teacher.name",
        "teacher.batch_size",
        "data.name",
        "data.cache",
        "data.workers",
        "train.micro_batch",
        "train.log_every",
        "clip.tile",
        "clip.two_pass",
        "parallel",
        "hardware",
        "checkpoint",
        "tracking",
    }
)
"""Keys and sections that say where and how fast a result is computed, and not which (up to the order of sums)."""


def digest(config: Config) -> str:
    """Eight hexadecimal digits over everything that changes the result of a run.

    Left out are the keys of `_WITHOUT_EFFECT`, and in the paths of built-in data the cache folder, so that a run is
    found again on another layout, with other batches of a forward pass, and after its data has moved.
    """
    kept = {
        key: value.removeprefix(config.data.cache) if isinstance(value, str) else value
        for key, value in _flatten(asdict(config), "")
        if not _without_effect(key)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def run_folder(config: Config) -> Path:
    """Folder of a run: `root/group/name`, where the name `auto` stands for stage-model-digest."""
    name = config.run.name
    if name == "auto":
        name = f"{config.stage}-{config.model.name}-{digest(config)}"
    return Path(config.run.root).expanduser() / config.run.group / name


def _without_effect(key: str) -> bool:
    return key in _WITHOUT_EFFECT or key.partition(".")[0] in _WITHOUT_EFFECT


def _flatten(tree: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in tree.items():
        leaves += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return leaves
