"""Reading the sources of drawings from a few files of the same kind."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from w2s.data.builtin.clipart import openclipart, tuxpaint
from w2s.data.builtin.emoji_drawings import fluent

CLIPART, STAMPS = Path("usr/share/openclipart/svg"), Path("usr/share/tuxpaint/stamps")
RED = '<rect x="{x}" y="0" width="10" height="20" fill="red"/>'
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


def write_svg(
    package: Path,
    name: str,
    title: str,
    keywords: tuple[str, ...] = (),
    licence: str = PUBLIC_DOMAIN,
    content: str = RED,
) -> None:
    path = package / CLIPART / name
    entries = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="40mm" height="40mm"'
        ' viewBox="0 0 40 40"><metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/"'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f"<cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{entries}</rdf:Bag></dc:subject>"
        "<dc:creator><cc:Agent><dc:title>An artist</dc:title></cc:Agent></dc:creator>"
        f'<cc:license rdf:resource="{licence}"/>'
        f"</cc:Work></rdf:RDF></metadata>{content.format(x=30)}</svg>"
    )


needs_resvg = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="pip install 'w2s[demo]'")
needs_emoji = pytest.mark.skipif(importlib.util.find_spec("emoji") is None, reason="pip install 'w2s[demo]'")


@needs_resvg
def test_captions_of_open_clip_art(tmp_path: Path) -> None:
    write_svg(
        tmp_path,
        "animals/a.svg",
        "Red_Dog #3 (B and W)",
        ("hash(0x1)", "", "dog", "mammal", "pet", "animal"),
    )
    write_svg(tmp_path, "food/fruit/prune_ganson_01.svg", "Clipart by N. B. - pear", ("food",))
    write_svg(tmp_path, "tools/axe.svg", "Axe", ("unsorted",))
    found = {drawing.key: drawing.name for drawing in openclipart(tmp_path)}
    assert found == {
        "animals/a": "red dog, mammal, pet",
        "food/fruit/prune_ganson_01": "prune, food",
        "tools/axe": "axe",
    }


@needs_resvg
def test_what_is_left_out_of_open_clip_art(tmp_path: Path) -> None:
    write_svg(tmp_path, "animals/gpl.svg", "dog", licence="http://web.resource.org/cc/GPL")
    write_svg(tmp_path, "animals/linked.svg", "dog", content=RED + '<image xlink:href="photo.jpg"/>')
    write_svg(tmp_path, "animals/broken.svg", "dog")
    (tmp_path / CLIPART / "animals/broken.svg").write_text(
        (tmp_path / CLIPART / "animals/broken.svg")
        .read_text()
        .replace('width="40mm"', 'width="0"')
        .replace("viewBox", "box")
    )
    write_svg(tmp_path, "shapes/stars/star.svg", "star")
    write_svg(tmp_path, "animals/cat.svg", "cat")
    (tmp_path / CLIPART / "animals/same.svg").symlink_to("cat.svg")
    assert [drawing.key for drawing in openclipart(tmp_path)] == ["animals/cat"]


@needs_resvg
def test_a_drawing_in_the_corner_of_a_page_is_cut_out(tmp_path: Path) -> None:
    write_svg(tmp_path, "animals/a.svg", "dog")
    (drawing,) = openclipart(tmp_path)
    # 10 x 20 of the 40 x 40 of a page that is drawn 256 pixels wide; 40 mm are no whole number of pixels
    assert drawing.image.size == (64, 129)
    assert drawing.image.getpixel((32, 64)) == (255, 0, 0, 255)


def test_stamps_of_tux_paint(tmp_path: Path) -> None:
    for name in ("animals/cat", "animals/cat_mirror", "symbols/letters/a", "animals/nameless", "food/pie"):
        (tmp_path / STAMPS / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (4, 4), "red").save(tmp_path / STAMPS / f"{name}.png")
    for name in ("animals/cat", "animals/cat_mirror", "symbols/letters/a"):
        (tmp_path / STAMPS / f"{name}.txt").write_text("A grey cat.\nde.utf8=Eine graue Katze.\n")
    (tmp_path / STAMPS / "food/pie.txt").write_text("\nde.utf8=Kuchen\n")
    assert [(stamp.key, stamp.name) for stamp in tuxpaint(tmp_path)] == [("animals/cat", "A grey cat.")]


@needs_emoji
def test_emoji_files_are_called_by_code_points(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    for name in ("1f998", "2764-fe0f", "1f44d-1f3fd", "1f1e9-1f1ea", "unknown"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / "assets" / f"{name}.webp")
    assert [(drawing.key, drawing.name) for drawing in fluent(tmp_path)] == [
        ("1f998", "kangaroo"),
        ("2764", "red heart"),
    ]
