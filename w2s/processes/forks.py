"""The server that new processes are forked from: one that has imported what takes seconds, and done nothing else."""

import multiprocessing
import os
from collections.abc import Iterable
from multiprocessing import forkserver, resource_tracker

from w2s.processes.stopping import signals_blocked


def start_fork_server(modules: Iterable[str]) -> None:
    """Start the server that this process' start method `forkserver` forks from, unless it runs already.

    It imports while this process has other work. What asks a run to stop is blocked in it and in what it forks: the
    server would lose the exit codes of the ranks that are still saving.

    Args:
        modules: what it imports; they must not start threads or touch a GPU, which a fork would not survive.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    # The server has no hook for what signals do there, but inherits which are blocked. The resource tracker unblocks
    # them when it starts, so it has to run already.
    resource_tracker.ensure_running()
    with signals_blocked():
        forkserver.ensure_running()


def started_by() -> int:
    """Return the id of the process that has started this one, by itself or through its server."""
    parent = multiprocessing.parent_process()
    return os.getppid() if parent is None or parent.pid is None else parent.pid
