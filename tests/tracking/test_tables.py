"""Tables on a narrow terminal."""

import io

from rich.console import Console

from w2s.tracking.tables import Table


def printed(table: Table, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(table.to_rich())
    return [line.strip() for line in out.getvalue().splitlines()]


def test_a_title_is_as_wide_as_the_terminal_and_breaks_no_word() -> None:
    title = "taken from runs/a-long-name-of-a-run/checkpoints/step-00000004 and another one"
    lines = printed(Table(title, ["a"], [[1]]), 70)
    assert lines[:2] == [title.removesuffix(" another one"), "another one"]


def test_a_word_that_does_not_fit_is_folded_and_loses_nothing() -> None:
    path = "runs/" + "x" * 60
    lines = printed(Table("", ["", ""], [["parent", path]]), 40)
    assert path in "".join(lines).replace("parent", "").replace(" ", "")
