"""The built-in data sets by name, and building one below the cache when a run first needs it."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from w2s.config.sections import DataConfig
from w2s.data.builtin import emoji, showcase
from w2s.data.builtin.showcase import left_out
from w2s.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


BUILTINS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "emoji": (emoji.NAME, emoji.build),
    "showcase": (showcase.NAME, showcase.build),
}
"""Folder below the cache, and what writes the data set into an empty folder, by name."""


def ensure_builtin(data: DataConfig, renew: bool = False) -> Path:
    """Build the built-in data set that the configuration names, unless it is there; say which sources it lacks.

    It is built beside its place and then renamed, so that it is whole or absent, also when several ranks build at once.

    Args:
        data: names the data set and the cache.
        renew: build one that lacks sources again. A run does not: its data must not change under its feet.

    Returns:
        its folder.

    Raises:
        ConfigError: the configuration names none.
        MissingPackageError: a package that it is made from is not installed.
        DataError: the cache cannot be written.
    """
    if data.builtin == "none":
        raise ConfigError(f"data={data.name} is not built from packages: there are {', '.join(BUILTINS)}")
    name, build = BUILTINS[data.builtin]
    target = Path(data.cache).expanduser() / name
    replace = renew and target.is_dir() and bool(left_out(target))
    if replace or not target.is_dir():
        try:
            _build(build, target, replace)
        except OSError as error:
            raise DataError(
                f"cannot write data.cache={data.cache} ({error}): choose another folder or W2S_CACHE"
            ) from error
    for title, reason in left_out(target).items():
        logger.warning("%s is without %s (%s): it is not the full data set", target, title, reason)
    return target


def without_left_out(data: DataConfig, sets: Mapping[str, str]) -> dict[str, str]:
    """Return test sets without those that the built-in data set lacks as their source was left out.

    Args:
        data: names the data set, which is built, and the cache.
        sets: shards by name.
    """
    if data.builtin == "none":
        return dict(sets)
    folder = Path(data.cache).expanduser() / BUILTINS[data.builtin][0]
    if not left_out(folder):
        return dict(sets)
    places = {name: Path(shards).expanduser() for name, shards in sets.items()}
    return {name: sets[name] for name, place in places.items() if place.parent != folder or place.is_dir()}


def _build(build: Callable[[Path], None], target: Path, replace: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        logger.info("building the data set %s", target)
        build(folder)
        if replace:
            target.rename(Path(scratch) / "before")
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another rank was faster, with the same bytes
                raise
