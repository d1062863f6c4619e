"""metrics.jsonl: one JSON object for every log call of a run."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from w2s.errors import UserError
from w2s.files import write_text, writing

FILE_NAME = "metrics.jsonl"


class History:
    """Appends to a run's metrics.jsonl; lines that the system refuses are kept and written when it takes them again.

    Args:
        run_dir: folder of the run.
        resumed_step: step that the run continues from; later lines are of steps that are now done again, and are cut.
            0 begins anew.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        self._path = run_dir / FILE_NAME
        kept = [record for record in read_history(run_dir) if record["step"] <= resumed_step] if resumed_step else []
        write_text(self._path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self._size = self._path.stat().st_size
        self._waiting = b""

    def append(self, step: int, samples: int, metrics: dict[str, float]) -> None:
        """Adds a line; a value that is not finite becomes null, which is what JSON has for it."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        record = {"step": step, "samples_seen": samples, "time": round(time.time(), 3), **values}
        self._waiting += f"{json.dumps(record)}\n".encode()
        with suppress(UserError):
            self.flush()

    def flush(self) -> None:
        """Writes the lines that the system has refused so far.

        Raises:
            UserError: it refuses them still.
        """
        with writing(self._path), self._path.open("r+b") as file:
            file.truncate(self._size)  # a write that failed may have left half a line
            file.seek(self._size)
            file.write(self._waiting)
            file.flush()
        self._size, self._waiting = self._size + len(self._waiting), b""


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a line has a step, and numbers or null by their names."""
    step, values = record.get("step"), record.values()
    return type(step) is int and 0 <= step < 2**63 and all(value is None or _is_number(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 2**1023


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics.jsonl, oldest first.

    A killed run may have left half a line at the end, and a damaged disk anything.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _is_record(record):
            records.append(record)
    return records
