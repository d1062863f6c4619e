"""The site's pages that tools/site_pages.py makes: every key and every command is there, with its documentation."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from w2s.cli import app
from w2s.config.fields import FIELDS
from w2s.config.load import load

PAGES = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "site_pages.py"))


def entries(pages: dict[str, str]) -> dict[str, list[str]]:
    """The lines under each heading that is a key's."""
    parts = re.split(r"^### `([\w.]+)`.*\n", "\n".join(pages.values()), flags=re.M)
    return dict(zip(parts[1::2], (part.split("\n") for part in parts[2::2]), strict=True))


def test_every_key_is_on_the_page_of_its_section_with_type_default_and_text() -> None:
    pages: dict[str, str] = PAGES["key_pages"]()
    found = entries(pages)
    assert set(found) == FIELDS.keys() - {"stage"}, "the stage is the command's"
    for key, lines in found.items():
        assert f"### `{key}` {{ #{key} }}" in pages[f"keys/{key.partition('.')[0]}.md"]
        assert re.fullmatch(r".+; default .+", lines[1]), key
        assert lines[4], f"{key} has no documentation"


def test_a_default_is_what_a_stage_takes() -> None:
    found = entries(PAGES["key_pages"]())
    steps = ", ".join(f"`{load(stage).train.steps}` ({stage})" for stage in ("mim", "clip", "eval"))
    assert found["train.steps"][1] == f"a whole number; default {steps}"
    assert found["optim.clip_grad"][1].startswith("a number; default ")
    assert found["run.group"][1] == "text; default empty"
    assert "`weight`: Weight of its loss among those of all pairs." in "\n".join(found["mim.layers"])


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield name, command
    for each, sub in inner.items():
        yield from commands(sub, f"{name} {each}")


@pytest.mark.parametrize(("name", "command"), list(commands(get_command(app), "w2s")))
def test_every_command_is_on_a_page_with_its_options(name: str, command: Any) -> None:
    page = PAGES["command_pages"]()[f"commands/{name.split()[1]}.md"]
    part = page[page.index(f"# `{name}`") :]
    part = part[: part.find("\n## ", 1) if "\n## " in part[1:] else None]
    assert command.help.split("\n")[0] in part
    for parameter in command.params:
        assert parameter.help in part, parameter.name
        assert all(f"`{option}`" in part for option in parameter.opts if option.startswith("-"))


def test_pages_of_the_root_have_the_links_of_the_site() -> None:
    pages: dict[str, str] = PAGES["root_pages"]()
    assert "](extending.md)" in pages["CONTRIBUTING.md"]
    assert "](docs/" not in "".join(pages.values())
