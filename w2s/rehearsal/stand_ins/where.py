"""The line of code that something was done in."""

import sys
from types import FrameType

_SKIPPED = (
    "/torch/",
    "/w2s/rehearsal/",
    "/w2s/bench/parts.py",
    "/w2s/megatron/cpu.py",
    "/contextlib.py",
    "/typing_extensions.py",
    "/functools.py",
)


def line() -> str:
    """Return the innermost line outside of torch and of the rehearsal: `w2s/objectives/collectives.py:23`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _SKIPPED):
        frame = frame.f_back
    return f"{_short(frame)}:{frame.f_lineno}"


def line_of(error: BaseException) -> str:
    """Return the innermost line of an error's traceback outside of torch and of the rehearsal."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if not any(part in trace.tb_frame.f_code.co_filename for part in _SKIPPED):
            line = f"{_short(trace.tb_frame)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _short(frame: FrameType) -> str:
    """The path below the folder that its package was imported from."""
    path, name = frame.f_code.co_filename, frame.f_globals.get("__name__", "")
    parts = name.count(".") + 1 + path.endswith("/__init__.py")
    return "/".join(path.split("/")[-parts:])
