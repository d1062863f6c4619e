"""A table that is printed, kept as JSON and shown in the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import rich.box
import rich.table
from rich.console import Group
from rich.text import Text

from w2s.files import write_text
from w2s.redaction import redacted, shown

Cell = str | int | float | None

MOST_COLUMNS = 12
"""A table of more is turned on a terminal: its columns become rows."""
LONGEST_SHORT = 12
"""Characters of a cell that is not wrapped."""


@dataclass(frozen=True)
class Table:
    """Columns and rows under a title.

    Attributes:
        title: heading; may be empty.
        columns: names of the columns.
        rows: one cell per column; numbers are aligned to the right.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_rich(self) -> Group:
        """The table for a terminal; its title has the width of the terminal, where its own would break words."""
        if len(self.columns) > MOST_COLUMNS:
            return self._turned().to_rich()
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, collapse_padding=True)
        for index, column in enumerate(self.columns):
            justify: Literal["left", "right"] = "right" if self.is_number(index) else "left"
            # Where a line is too short, long cells are wrapped before a digit is cut off.
            short = self._is_short(index)
            overflow: Literal["ellipsis", "fold"] = "ellipsis" if short else "fold"
            table.add_column(Text(shown(column)), justify=justify, no_wrap=short, overflow=overflow)
        for row in self.rows:
            table.add_row(*(Text(cell_text(cell)) for cell in row))
        return Group(Text(shown(self.title), style="table.title"), table) if self.title else Group(table)

    def to_markdown(self) -> str:
        """The table as Markdown, its title above it."""
        lines = [self.columns, [("---:" if self.is_number(n) else "---") for n in range(len(self.columns))], *self.rows]
        rows = ["| " + " | ".join(cell_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *rows, ""])

    def _turned(self) -> "Table":
        first, *others = zip(self.columns, *self.rows, strict=True)
        return Table(self.title, [cell_text(cell) for cell in first], others)

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, int | float) for cell in cells)

    def _is_short(self, column: int) -> bool:
        """Whether all cells of a column stay on one line, its name too."""
        cells = [self.columns[column], *(cell_text(row[column]) for row in self.rows)]
        return max(map(len, cells)) <= LONGEST_SHORT

    def save(self, path: Path) -> None:
        """Writes the table as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        write_text(path, json.dumps(redacted(asdict(self)), indent=1))

    @classmethod
    def load(cls, path: Path) -> "Table":
        """Reads what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def cell_text(cell: Cell) -> str:
    """A cell as a person reads it: four significant digits, or all up to the point; nothing for None, no controls."""
    if cell is None:
        return ""
    if not isinstance(cell, float):
        return shown(str(cell))
    return f"{cell:.0f}" if 1e4 <= abs(cell) < 1e7 else f"{cell:.4g}"
