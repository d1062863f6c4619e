"""group.json: which runs a `w2s run` has; and runs by their names."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w2s.errors import UserError
from w2s.files import write_text

FILE_NAME = "group.json"


def write_group(folder: Path, title: str, runs: Sequence[str]) -> None:
    """Notes what the folder of a `w2s run` holds, for its report.

    Args:
        folder: of the group.
        title: heading of its report.
        runs: names of the folders of its runs, in the order to show.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(folder / FILE_NAME, json.dumps({"title": title, "runs": list(runs)}, indent=1))


def is_group(folder: Path) -> bool:
    """Whether a folder is that of a `w2s run`."""
    return (folder / FILE_NAME).is_file()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run that has begun."""
    return (folder / "config.yaml").is_file() or (folder / "result.json").is_file()


def find_runs(names: Sequence[str], root: Path) -> list[Path]:
    """Folders of runs, or of a single `w2s run`, by their paths or their names below `root`.

    Raises:
        UserError: there is no such run.
    """
    paths = []
    for name in names:
        path = next((each for each in (Path(name).expanduser(), root / name) if is_group(each) or is_run(each)), None)
        if path is None:
            raise UserError(f"RUN={name} is not a run, nor one below {root}: see `ls {root}`")
        paths.append(path)
    return paths


def by_label(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by the names of their folders, with that of their group where several have the same; each once."""
    folders = list(dict.fromkeys(run.absolute() for run in runs))
    names = [folder.name for folder in folders]
    return {
        folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}": folder
        for folder in folders
    }


def runs_of(folder: Path) -> list[Path]:
    """The runs of a group that have begun; a run itself."""
    if not is_group(folder):
        return [folder]
    return [folder / name for name in _read(folder)["runs"] if is_run(folder / name)]


def title_of(group: Path) -> str:
    """The heading of a group's report."""
    return str(_read(group)["title"])


def _read(group: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((group / FILE_NAME).read_text(encoding="utf-8"))
    return content
