"""The picture of the floors in docs/tour.md is the order that lint-imports holds the imports to."""

import configparser
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def drawn() -> list[set[str]]:
    """The rooms of each floor in the picture, the highest first."""
    page = (REPOSITORY / "docs" / "tour.md").read_text(encoding="utf-8")
    part = page[page.index("## The floors") :]
    (picture,) = re.findall(r"^```text\n(.*?)^```$", part, flags=re.S | re.M)
    rooms = [re.split(r"\s{2,}", line.lstrip(" ├└─"))[0] for line in picture.splitlines()]
    return [set(names.split(", ")) for names in rooms]


def contract() -> list[set[str]]:
    """The rooms of each layer in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    layers = setup["importlinter:contract:layers"]["layers"].split("\n")
    return [{name.strip().removeprefix("w2s.") for name in layer.split(":")} for layer in layers if layer]


def test_the_picture_is_the_contract() -> None:
    assert drawn() == contract()


def test_every_room_is_on_one_floor() -> None:
    folders = {path.parent.name for path in (REPOSITORY / "w2s").glob("*/__init__.py")}
    files = {path.stem for path in (REPOSITORY / "w2s").glob("*.py")} - {"__init__", "__main__"}
    floors = drawn()
    assert set().union(*floors) == folders | files | {"stages"}
    assert sum(map(len, floors)) == len(set().union(*floors))
