"""Where a run lives: its folder, and the digest by which a repeated command finds it again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from w2s.config.sections import Config
from w2s.redaction import identity, redacted

_WITHOUT_EFFECT = frozenset(
    {
        "run.root",
        "run.name",
        "run.group",
        "model.name",
        "teacher.name",
        "teacher.batch_size",
        "teacher.compile",
        "teacher.sharded",
        "data.name",
        "data.cache",
        "data.index",
        "data.allow_pipe",
        "data.workers",
        "data.read_ahead_mb",
        "data.timeout",
        "train.micro_batch",
        "train.log_every",
        "train.callbacks",
        "train.profile",
        "clip.tile",
        "clip.two_pass",
        "optim.ema",
        "parallel",
        "precision.linear",
        "hardware",
        "checkpoint",
        "tracking",
    }
)
"""Keys and sections that say where and how fast a result is computed, and not which (up to the order of sums), or what
is kept beside it."""


_SINCE: Mapping[str, Any] = {
    "teachers.of": [],
    "teachers.of.share": 1.0,
    "teachers.of.sources": [],
    "teachers.draw": "all",
    "init.teacher": "",
    "teacher.weights": "last",
    "init.weights": "last",
    "eval.weights": "last",
}
"""Keys that came later, also those of the sections in a list, and the values with which a run is what it was before."""


def digest(config: Config) -> str:
    """Eight hexadecimal digits over everything that changes the result of a run.

    Left out are the keys of `_WITHOUT_EFFECT`, and in the paths of built-in data the cache folder, so that a run is
    found again on another layout, with other batches of a forward pass, and after its data has moved; and credentials,
    which change.
    """
    kept = _kept(identity(asdict(config)))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def written(config: Config) -> dict[str, Any]:
    """A configuration as a checkpoint keeps it: without credentials, and with the digest of what it was with them."""
    return {**redacted(asdict(config)), "digest": digest(config)}


def difference(config: Config, saved: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key whose value changes the result and is another one in what `written` gave: key, saved, now.

    The key is `digest` where only the value of an environment variable is another.
    """
    now, then = _kept(written(config)), _kept(redacted(saved))
    if "digest" not in then:  # of an older release
        now.pop("digest")
    return next(((key, then.get(key), now.get(key)) for key in now | then if now.get(key) != then.get(key)), None)


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that change the result of a run, by key, as JSON has them."""
    data = config.get("data")
    cache = str(data.get("cache", "")) if isinstance(data, Mapping) else ""
    kept = {
        key: value.removeprefix(cache) if isinstance(value, str) else _entries_kept(key, value)
        for key, value in flatten(config).items()
        if not _without_effect(key) and not _as_before(key, value)
    }
    return cast(dict[str, Any], json.loads(json.dumps(kept)))


def _entries_kept(key: str, value: Any) -> Any:
    """A list of sections without what has the value of before; any other value as it is."""
    if not isinstance(value, list):
        return value
    return [
        {name: part for name, part in entry.items() if not _as_before(f"{key}.{name}", part)}
        if isinstance(entry, Mapping)
        else entry
        for entry in value
    ]


def _as_before(key: str, value: Any) -> bool:
    return key in _SINCE and bool(value == _SINCE[key])


def run_folder(config: Config) -> Path:
    """Folder of a run: `root/group/name`, where the name `auto` stands for stage-model-digest."""
    name = config.run.name
    if name == "auto":
        name = f"{config.stage}-{config.model.name}-{digest(config)}"
    return Path(config.run.root).expanduser() / config.run.group / name


def _without_effect(key: str) -> bool:
    return key in _WITHOUT_EFFECT or key.partition(".")[0] in _WITHOUT_EFFECT


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
