"""The packages of setup.cfg are what lies in the checkout."""

import configparser
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_every_package_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    listed = setup_cfg["options"]["packages"].split()
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "w2s").rglob("__init__.py")}
    assert sorted(listed) == sorted(found | {"w2s.configs", "w2s.stages"})
    assert (ROOT / "w2s" / "stages").samefile(ROOT / "stages"), "a link: at the top for readers, below w2s for Python"


def test_the_configurations_travel_with_the_package() -> None:
    installed = files("w2s.configs")
    for path in (ROOT / "configs").rglob("*.yaml"):
        copy = installed.joinpath(*path.relative_to(ROOT / "configs").parts)
        assert copy.read_text() == path.read_text()
