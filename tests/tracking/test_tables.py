"""Tables on a terminal."""

import io

import pytest
from rich.console import Console

from w2s.tracking.tables import Table

ROWS = [
    ["TP2+SP PP2 DP64", "24 by 4", 16, "selective", 67.5, 0.966, "0.875 - 1.09", 49.6],
    ["TP4+SP PP16 DP32", "12 by 16", 1696, "full 45", 67.5, 1234.0, "1230 - 1250", 0.0123],
]
TABLE = Table("", ["layout", "VPP", "micro", "recompute", "GiB", "s/step", "from - to", "MFU %"], ROWS)


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table.to_rich())
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_keeps_all_digits(width: int) -> None:
    """Long cells are wrapped before numbers are."""
    text = printed(TABLE, width)
    for row in ROWS:
        assert all(f" {cell:.4g} " in text for cell in row if isinstance(cell, float))
        assert all(f" {cell} " in text for cell in row[1:] if not isinstance(cell, float))


def test_what_is_cut_off_is_seen_to_be() -> None:
    text = printed(Table("", ["number", "word"], [[1234567, "unbreakable"]]), 14)
    assert text.count("…") == 3, "of a header and both cells"


def test_a_title_is_as_wide_as_the_terminal_and_breaks_no_word() -> None:
    title = "taken from runs/a-long-name-of-a-run/checkpoints/step-00000004 and another one"
    lines = [line.strip() for line in printed(Table(title, ["a"], [[1]]), 70).splitlines()]
    assert lines[:2] == [title.removesuffix(" another one"), "another one"]


def test_a_word_that_does_not_fit_is_folded_and_loses_nothing() -> None:
    path = "runs/" + "x" * 60
    text = printed(Table("", ["", ""], [["parent", path]]), 40)
    assert path in text.replace("parent", "").replace(" ", "").replace("\n", "")
