"""Links of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/: what they name is there, as a file and as a heading."""

import re
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
GENERATED = ("commands/", "keys/")
"""Folders of docs/ that the site alone has: `mkdocs build --strict` checks links to them."""


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """What headings are called in an address, as GitHub makes it of them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def dead_links(page: Path, text: str) -> list[str]:
    """The links of a page's text that lead nowhere; those to other sites are not followed."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link) or path.startswith(GENERATED):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_no_link_is_dead(page: Path) -> None:
    assert dead_links(page, prose(page)) == []


@pytest.mark.parametrize("link", ["docs/no_such_page.md", "docs/data.md#no-such-heading", "#no-such-heading"])
def test_a_dead_link_is_found(link: str) -> None:
    assert dead_links(REPOSITORY / "README.md", f"[words]({link}) [others](docs/data.md#bad-samples)") == [link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_files_that_the_text_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:w2s|stages|tools|tests|configs|docs)/[\w./]*\w)`", prose(page))
    assert [name for name in named if "NAME" not in name and not (REPOSITORY / name).exists()] == []
