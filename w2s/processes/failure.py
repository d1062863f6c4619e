"""What a user is told of an exception: one line and an exit code."""

import errno
from dataclasses import dataclass

from w2s.errors import W2SError
from w2s.redaction import shown

FAILURE_FILE = "W2S_FAILURE_FILE"
"""Environment variable: where a rank, or its watcher, leaves a `Failure` in JSON for the launcher."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Failure:
    """What a rank leaves behind when it fails."""

    message: str
    exit_code: int
    expected: bool
    """Whether it is one of our errors."""
    signal_number: int
    """The signal of a StopRun, else 0."""
    traceback: str


def describe(error: BaseException) -> tuple[str, int]:
    """The line that says what went wrong, and the exit code: 2 for a user's mistake, 1 for a failed run."""
    if isinstance(error, W2SError):
        return _one_line(str(error)), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        place = error.filename or "the run folder"
        fix = "free it, or choose another folder with run.root=FOLDER"
        return _one_line(f"cannot use {place}: {error.strerror}: {fix}"), 2
    return _one_line(f"{type(error).__name__}: {error}"), 1


def _one_line(text: str) -> str:
    return shown(" ".join(text.split()))
