"""Drawings with words of their own: the Open Clip Art Library, and the stamps of Tux Paint."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from w2s.data.builtin.drawings import Drawing, draw_svg
from w2s.data.samples.decode import open_image

_FOLDERS = (
    "animals",
    "buildings",
    "computer/hardware",
    "containers",
    "education",
    "electronics",
    "food",
    "geography",
    "office",
    "people",
    "plants",
    "recreation/holiday",
    "recreation/music",
    "recreation/sports",
    "recreation/toys",
    "science",
    "tools",
    "transportation/boating",
    "transportation/vehicles",
)
"""Where things with names are; the rest is icons, flags, signs, 1,378 stars and patterns."""

_LARGEST = 500_000
"""Bytes of a file; the few larger ones take seconds to draw."""
_KEYWORDS = 2
_PAGE_WIDTH = 256

_TITLE = "{http://purl.org/dc/elements/1.1/}title"
_SUBJECT = "{http://purl.org/dc/elements/1.1/}subject"
_ENTRY = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
_LINK = "{http://www.w3.org/1999/xlink}href"
_IMAGE = "{http://www.w3.org/2000/svg}image"
_OF_A_COLLECTION = re.compile(r"clip ?art|submission|sibmission|aiga|etiquette|^r\d+ ")
"""Titles that the files of a whole collection share."""
_NOISE = re.compile(r"hash|clip|unsorted|symbol|menu|work|architett|\d")
"""Keywords that name no thing."""

_MIRRORED_STAMPS = ("_mirror", "_flip")


def openclipart(package: Path) -> Iterator[Drawing]:
    """Yield the public-domain drawings of the Debian package, captioned by the titles and keywords inside of them.

    None that cannot be drawn or that lack a linked picture.
    """
    folder = package / "usr/share/openclipart/svg"
    for path in sorted(path for part in _FOLDERS for path in (folder / part).rglob("*.svg")):
        if path.is_symlink() or path.stat().st_size > _LARGEST:
            continue
        root = ElementTree.parse(path).getroot()
        caption = _caption(root, path.stem)
        if not caption or not _is_public_domain(root) or _links_pictures(root):
            continue
        try:
            page = draw_svg(path, _PAGE_WIDTH)
        except ValueError:
            continue
        # Some drawings are a corner of an empty page.
        yield Drawing(path.relative_to(folder).with_suffix("").as_posix(), caption, page.crop(page.getbbox()))


def _is_public_domain(root: Element) -> bool:
    return any("PublicDomain" in value for element in root.iter() for value in element.attrib.values())


def _links_pictures(root: Element) -> bool:
    """Whether pictures that are not in the file belong to it; Inkscape writes "Linked image not found" for them."""
    return any(not image.get(_LINK, "").startswith("data:") for image in root.iter(_IMAGE))


def _caption(root: Element, stem: str) -> str:
    """The title and the first keywords that it does not hold yet, in small letters."""
    titles = (_plain(root.findtext(f".//{_TITLE}") or ""), _plain(stem))
    title = next((text for text in titles if len(text) > 2 and not _OF_A_COLLECTION.search(text)), "")
    keywords = [_plain(entry.text or "") for entry in root.iterfind(f".//{_SUBJECT}//{_ENTRY}")]
    new = dict.fromkeys(word for word in keywords if word and word not in title and not _NOISE.search(word))
    return ", ".join([title, *list(new)[:_KEYWORDS]]).strip(", ")


def _plain(text: str) -> str:
    """Small letters, without numbers, remarks in parentheses and file name's signs."""
    text = re.sub(r"\(.*?\)|\bb ?w\b|\bganson\b|\.svg\b|[_#\d]+", " ", text.lower().replace("_", " "))
    return " ".join(text.split()).strip(" -.,")


def tuxpaint(package: Path) -> Iterator[Drawing]:
    """Yield the stamps of the Debian package that show things, photographs and drawings, each with its sentence.

    No letters, digits and signs, and none in a mirror.
    """
    folder = package / "usr/share/tuxpaint/stamps"
    for path in sorted(folder.rglob("*.png")):
        key = path.relative_to(folder).with_suffix("")
        text = path.with_suffix(".txt")
        if key.parts[0] == "symbols" or path.stem.endswith(_MIRRORED_STAMPS) or not text.is_file():
            continue
        name = text.read_text(encoding="utf-8").partition("\n")[0].strip()
        if name:
            yield Drawing(key.as_posix(), name, open_image(path))
