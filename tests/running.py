"""The ranks of a command, and whether processes have ended."""

import time
from collections.abc import Sequence

import psutil


def ranks_of(command: int) -> list[psutil.Process]:
    """The local ranks of a command, in their order; they are forked from its server."""
    return sorted((rank for server in servers_of(command) for rank in server.children()), key=lambda rank: rank.pid)


def servers_of(command: int) -> list[psutil.Process]:
    """The server that a command forks from, which ends with it."""
    return [each for each in psutil.Process(command).children() if "forkserver" in " ".join(each.cmdline())]


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; nobody may have asked for its exit code yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def running_after(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after so long; returns as soon as none does."""
    end = time.monotonic() + seconds
    while (left := [process for process in processes if runs(process)]) and time.monotonic() < end:
        time.sleep(0.01)
    return left
