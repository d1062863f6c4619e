import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from w2s.errors import UserError
from w2s.tracking.about import About
from w2s.tracking.report.charts import bokeh_script
from w2s.tracking.report.report import write_comparison, write_report
from w2s.tracking.run_group import find_runs, write_group
from w2s.tracking.tables import Table, cell_text

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects the tags, the attributes that fetch something, what is drawn, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.charts += [json.loads(value or "") for name, value in attributes if name == "data-chart"]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"]:
            self.text += data if self.tags[-1:] == ["wbr"] else f" {data}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "mim"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "masked_patches.png").write_bytes(b"PNG")
    (folder / "config.yaml").write_text(f"name: {EVIL}\n")
    records = [
        {"step": step, "samples_seen": 0, "time": 0.0, "loss": -step / 2000, f"x{EVIL}": step} for step in range(2000)
    ]
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
    assert not re.search(r"@import|url\((?!#)", html.replace(bokeh_script(), ""))
    assert page.tags.count("script") == 2 and "link" not in page.tags  # BokehJS, and what draws the curves with it
    assert f"Zero-shot {EVIL}" in page.text and f"name: {EVIL}" in page.text


def test_the_report_shows_tables_pictures_and_curves(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert "0.1235" in page.text and "masked patches" in page.text
    assert base64.b64encode(b"PNG").decode() in html
    loss, evil = page.charts  # `final` was logged once: no curve
    assert (loss["over"], loss["curves"][0]["label"], evil["curves"][0]["label"]) == ("step", "training", f"x{EVIL}")
    assert loss["curves"][0]["x"][:2] == [0, 4] and loss["curves"][0]["y"][:2] == [0, -0.002]  # thinned
    assert len(html) < 1_600_000


def test_a_report_without_curves_has_no_script(tmp_path: Path) -> None:
    assert "script" not in Page(write_report(run_with(tmp_path / "clip", [1.0])).read_text()).tags


def test_a_report_is_the_same_each_time(run_dir: Path) -> None:
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def run_with(folder: Path, losses: list[float], **facts: str) -> Path:
    """A run of the contrastive stage with a loss at every step, and its samples."""
    folder.mkdir(parents=True)
    lr = facts.pop("lr", "1.0")
    (folder / "config.yaml").write_text(f"stage: clip\noptim: {{lr: {lr}, warmup: 2}}\n")
    lines = [
        {"step": step, "samples_seen": 8 * step, "time": 1.0, "loss": loss, "memory_gib": 1.0}
        for step, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    About(folder, facts, resumed=False)
    return folder


def test_a_group_begins_with_the_summary_and_has_every_run_that_has_begun(tmp_path: Path) -> None:
    run_with(tmp_path / "clip", [3.0, 2.0, 1.0])
    run_with(tmp_path / "scratch", [3.0, 2.5, 2.0])
    Table("Summary", ["step", "seconds"], [["mim", 12.0]]).save(tmp_path / "tables" / "summary.json")
    write_group(tmp_path, "demo", ["clip", "scratch", "still to come"])
    About(tmp_path, {"meaning": "clip is ahead."}, resumed=True)
    page = Page(write_report(tmp_path).read_text())
    order = [page.text.index(text) for text in ("demo", "clip is ahead.", "Summary", "did not change")]
    assert order == sorted(order)
    assert page.tags.count("section") == 2
    assert [address for address in page.fetched if address.startswith("#run")] == ["#run-1", "#run-2"]
    # The loss of both in one, and in each run's own; memory stays the same.
    assert [chart["over"] for chart in page.charts] == ["training samples", "step", "step"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / "a", [2.0, 1.0], teacher="small"), run_with(tmp_path / "b", [3.0, 1.5], lr="0.5")]
    write_comparison(tmp_path / "page.html", runs)
    words = " ".join(Page((tmp_path / "page.html").read_text()).text.split())
    assert "optim.lr 1 0.5" in words and "optim.warmup" not in words  # what is equal is left out
    assert "loss 1 1.5" in words and "teacher small" in words


def test_runs_of_one_name_are_told_apart_by_their_groups_and_none_comes_twice(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / group / "clip", [2.0, loss]) for group, loss in (("a", 1.0), ("b", 1.5))]
    write_comparison(tmp_path / "page.html", [*runs, runs[0]])
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("section") == 2 and "loss 1 1.5" in " ".join(page.text.split())
    assert "a/clip" in page.text and "b/clip" in page.text


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    run = run_with(tmp_path / "runs" / "a", [2.0, 1.0])
    assert find_runs([str(run), "a"], tmp_path / "runs") == [run, run]
    with pytest.raises(UserError, match=r"RUN=b is not a run, nor one below"):
        find_runs(["b"], tmp_path / "runs")


def test_the_head_of_a_report(tmp_path: Path) -> None:
    run = run_with(tmp_path / "mim", [2.0, 1.0], teacher="timm:big", parameters="12", checkpoint="/runs/x")
    (run / "result.json").write_text("{}")
    words = " ".join(Page(write_report(run).read_text()).text.split())
    for fact in ("state finished, step 1", "begun 2", "command w2s", "teacher timm:big", "parameters 12", "/runs/x"):
        assert fact in words


def test_cells_and_columns() -> None:
    table = Table("", ["a", "b", "c"], [["x", 1, None], ["y", 0.5, None]])
    assert [table.is_number(index) for index in range(3)] == [False, True, False]
    assert [cell_text(cell) for cell in (None, 3, 0.123456, "x", 10712.4)] == ["", "3", "0.1235", "x", "10712"]


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
