"""CITATION.cff names this version and has what the format asks for."""

from pathlib import Path

import yaml

import w2s


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == w2s.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
