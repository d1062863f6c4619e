"""about.json: the facts of a run or of a `w2s run` by name, the head of its report and the tags of its MLflow run."""

import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from w2s.files import write_text
from w2s.redaction import redact
from w2s.tracking.environment import git_sha

FILE_NAME = "about.json"
BEGUN = "begun"


class About:
    """The facts of a run, in the order in which they are shown.

    Args:
        folder: of the run.
        facts: what is known when it begins.
        resumed: whether it continues; when and by which command it was begun stays.

    Attributes:
        facts: text by name.

    Raises:
        UserError: about.json cannot be written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str], *, resumed: bool) -> None:
        self._folder = folder
        sha = git_sha()
        began = {"command": command_line(), BEGUN: time.strftime("%Y-%m-%d %H:%M:%S")}
        place = {"host": platform.node(), "folder": str(folder.absolute()), **({"git_sha": sha} if sha else {})}
        self.facts = began | (read_about(folder) if resumed else {}) | place
        self.note(facts)

    def note(self, facts: Mapping[str, str]) -> None:
        """Adds facts, or renews them.

        Raises:
            UserError: about.json cannot be written.
        """
        self.facts |= {name: redact(text) for name, text in facts.items()}
        write_text(self._folder / FILE_NAME, json.dumps(self.facts, indent=1))

    @property
    def tags(self) -> dict[str, str]:
        """The facts as tags of an MLflow run."""
        return as_tags(self.facts)


def as_tags(facts: Mapping[str, str]) -> dict[str, str]:
    """Facts as tags of an MLflow run: `w2s.NAME`."""
    return {f"w2s.{name}": redact(text) for name, text in facts.items()}


def command_line() -> str:
    """The command that this process was started with, without credentials."""
    return redact(shlex.join(["w2s", *sys.argv[1:]]))


def read_about(folder: Path) -> dict[str, str]:
    """The facts of a run; none of a run that has no about.json, or a damaged one."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(text) for name, text in content.items()} if isinstance(content, dict) else {}
