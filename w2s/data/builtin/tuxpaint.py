"""The stamps of Tux Paint: photographs and drawings, each with a sentence about it."""

from collections.abc import Iterator
from pathlib import Path

from w2s.data.builtin.drawings import Drawing
from w2s.data.samples.decode import open_image

_VARIANTS = ("_mirror", "_flip")


def tuxpaint(folder: Path) -> Iterator[Drawing]:
    """Yield the stamps below a folder that show things: no letters, digits and signs, and none in a mirror."""
    for path in sorted(folder.rglob("*.png")):
        key = path.relative_to(folder).with_suffix("")
        text = path.with_suffix(".txt")
        if key.parts[0] == "symbols" or path.stem.endswith(_VARIANTS) or not text.is_file():
            continue
        name = text.read_text(encoding="utf-8").partition("\n")[0].strip()
        if name:
            yield Drawing(key.as_posix(), name, open_image(path))
