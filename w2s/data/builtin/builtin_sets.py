"""The built-in data sets by name, and building one below the cache when a run first needs it."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from w2s.config.sections import DataConfig
from w2s.data.builtin import emoji, showcase
from w2s.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Builtin:
    """A data set that is built from packages."""

    folder: str
    """Its folder below the cache."""
    build: Callable[[Path], None]
    """Writes it into an empty folder."""
    left_out: Callable[[Path], Mapping[str, str]]
    """Why sources are missing in a folder that was built, by their titles; nothing where all are there."""


BUILTINS = {
    "emoji": Builtin(emoji.NAME, emoji.build, lambda _: {}),
    "showcase": Builtin(showcase.NAME, showcase.build, showcase.left_out),
}


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
    builtin = BUILTINS[data.builtin]
    target = Path(data.cache).expanduser() / builtin.folder
    replace = renew and target.is_dir() and bool(builtin.left_out(target))
    if replace or not target.is_dir():
        try:
            _build(builtin, target, replace)
        except OSError as error:
            raise DataError(
                f"cannot write data.cache={data.cache} ({error}): choose another folder or W2S_CACHE"
            ) from error
    for title, reason in builtin.left_out(target).items():
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
    builtin = BUILTINS[data.builtin]
    folder = Path(data.cache).expanduser() / builtin.folder
    if not builtin.left_out(folder):
        return dict(sets)
    places = {name: Path(shards).expanduser() for name, shards in sets.items()}
    return {name: sets[name] for name, place in places.items() if place.parent != folder or place.is_dir()}


def _build(builtin: Builtin, target: Path, replace: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{builtin.folder}.") as scratch:
        folder = Path(scratch) / builtin.folder
        folder.mkdir()
        logger.info("building the data set %s", target)
        builtin.build(folder)
        if replace:
            target.rename(Path(scratch) / "before")
        _publish(folder, target)


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # else another rank was faster, with the same bytes
            raise
