"""What a run ran on: Python, packages, machine and source."""

import os
import platform
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch

import w2s


def cards() -> list[str]:
    """Name and memory of each GPU."""
    names = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        names.append(f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    return names


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_sha() -> str | None:
    """Commit of the source that is running, or None when it does not run from a checkout."""
    source = Path(w2s.__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment_text() -> str:
    """The text of environment.txt: machine first, then each package as `name==version`."""
    machine = {
        "w2s": w2s.__version__,
        "git": git_sha() or "not a checkout",
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu cores": cores(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "gpus": "; ".join(cards()) or "none",
        "cuda": torch.version.cuda or "none",
    }
    lines = [f"{name}: {value}" for name, value in machine.items()]
    return "\n".join([*lines, "", *_packages(), ""])


@lru_cache(1)
def _packages() -> list[str]:
    """Each installed package as `name==version`."""
    about = [package.metadata for package in distributions()]  # whose text is parsed each time that it is asked for
    return sorted({f"{each['Name']}=={each['Version']}" for each in about}, key=str.lower)
