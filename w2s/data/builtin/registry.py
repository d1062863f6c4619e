"""Data sets that w2s builds by itself, from packages, when a run first needs them."""

import logging
import tempfile
from pathlib import Path

from w2s.config.sections import DataConfig
from w2s.data.builtin import emoji
from w2s.errors import DataError

logger = logging.getLogger(__name__)


def ensure_builtin(data: DataConfig) -> None:
    """Build the built-in data set that the configuration names, unless it is there.

    It is built beside its place and then renamed, so that it is whole or absent, also when several ranks build at once.

    Raises:
        MissingPackageError: a package that it is made from is not installed.
        DataError: the cache cannot be written.
    """
    if data.builtin == "none":
        return
    cache = Path(data.cache).expanduser()
    target = cache / emoji.NAME
    if target.is_dir():
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{emoji.NAME}.") as scratch:
            folder = Path(scratch) / emoji.NAME
            folder.mkdir()
            logger.info("building the data set %s in %s", data.builtin, target)
            emoji.build(folder)
            _publish(folder, target)
    except OSError as error:
        raise DataError(
            f"cannot write data.cache={data.cache} ({error}): choose another folder or W2S_CACHE"
        ) from error


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():  # else another rank was faster, with the same bytes
            raise
