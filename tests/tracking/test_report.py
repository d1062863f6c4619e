import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from w2s.tracking.charts import curve_svg
from w2s.tracking.report import write_group_report, write_report
from w2s.tracking.tables import Table, cell_text

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects the tags, the attributes that fetch something, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "mim"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "masked_patches.png").write_bytes(b"PNG")
    (folder / "config.yaml").write_text(f"name: {EVIL}\n")
    records = [{"step": step, "samples_seen": 0, "time": 0.0, "loss": -0.1, f"x{EVIL}": None} for step in range(2000)]
    records.append({"step": 2000, "samples_seen": 0, "time": 0.0, "final": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Table(f"Zero-shot {EVIL}", ["metric", EVIL], [["top-1", 0.12345], [EVIL, None]]).save(
        folder / "tables" / "zero.json"
    )
    return folder


def test_the_report_needs_nothing_else_and_runs_nothing(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert page.fetched
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.fetched)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "script" not in page.tags and "link" not in page.tags
    assert f"Zero-shot {EVIL}" in page.text and f"name: {EVIL}" in page.text


def test_the_report_shows_tables_pictures_and_curves(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert "0.1235" in page.text and "masked patches" in page.text
    assert base64.b64encode(b"PNG").decode() in html
    assert page.tags.count("svg") == 2  # `final` was logged once: no curve
    assert len(html) < 150_000  # 2,000 points are thinned


def test_a_group_begins_with_the_summary_and_has_every_run(run_dir: Path) -> None:
    empty = run_dir.parent / "eval"
    empty.mkdir()
    summary = Table("Summary", ["step", "seconds"], [["mim", 12.0]])
    page = Page(write_group_report(run_dir.parent, "demo", [run_dir, empty], [summary]).read_text())
    assert page.text.index("Summary") < page.text.index("Zero-shot")
    assert page.tags.count("section") == 2
    assert {"#run-1", "#run-2"} <= set(page.fetched)


def test_a_curve_takes_the_colours_of_the_page() -> None:
    svg = curve_svg("a", "loss", [0, 1, 2], [1.0, None, 0.5])
    assert svg.startswith("<svg") and "currentColor" in svg and "var(--accent)" in svg
    assert "#010203" not in svg and "metadata" not in svg
    assert svg == curve_svg("a", "loss", [0, 1, 2], [1.0, None, 0.5])


def test_two_charts_of_a_page_share_no_ids() -> None:
    ids = [
        set(re.findall(r'clipPath id="([^"]+)"', curve_svg(key, "loss", [0, 1], [1.0, 0.5]))) for key in ("mim", "clip")
    ]
    assert ids[0] and not ids[0] & ids[1]


def test_cells_and_columns() -> None:
    table = Table("", ["a", "b", "c"], [["x", 1, None], ["y", 0.5, None]])
    assert [table.is_number(index) for index in range(3)] == [False, True, False]
    assert [cell_text(cell) for cell in (None, 3, 0.123456, "x")] == ["", "3", "0.1235", "x"]


def test_a_table_as_markdown() -> None:
    table = Table("t", ["name", "value"], [["a|b", 0.5], ["c", None]])
    assert table.to_markdown().splitlines() == [
        "**t**",
        "",
        "| name | value |",
        "| --- | ---: |",
        "| a\\|b | 0.5 |",
        "| c |  |",
    ]
