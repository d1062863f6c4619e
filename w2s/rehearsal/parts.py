"""Which part of a step is open."""

from collections.abc import Iterator
from contextlib import contextmanager

REST = "rest"
"""The part of a step that has no other name."""


class Parts:
    """Takes what `w2s.bench.parts` marks."""

    def __init__(self) -> None:
        self._open = [REST]

    @property
    def now(self) -> str:
        """The innermost part that is open."""
        return self._open[-1]

    def begin(self, name: str) -> None:
        """Open a part inside of the one that is open."""
        self._open.append(name)

    def end(self) -> None:
        """Close the innermost part."""
        self._open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()
