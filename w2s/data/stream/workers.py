"""Starting the reading processes of a rank."""

import signal
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from w2s.compat import shut_down_workers, worker_processes
from w2s.errors import DataError
from w2s.processes.forks import start_fork_server
from w2s.processes.host import keep_freed_memory
from w2s.processes.stopping import SIGNALS, end_with_parent

RESTARTS = 3
"""Times that the reading processes are started for the same samples."""

T = TypeVar("T")


def prepare_workers() -> None:
    """Start the server that workers are forked from, which imports the reader while this process has other work."""
    start_fork_server(["w2s.data.stream.reader"])


def start_workers(dataset: IterableDataset[T], workers: int) -> Iterator[T]:
    """Return the items of a data set; item `i` is from worker `i % workers`. 0 workers read in this process.

    Workers are forked from a server process that has imported the reader and nothing else, so that they have no CUDA
    context, process groups, threads or torch function mode of the rank. A signal that stops the rank (Ctrl-C or
    SIGTERM to its whole process group) leaves them alone: the rank finishes its step, saves and ends them itself.
    If it is killed, they end at once.
    """
    # The loader draws a seed that nothing here uses; its own generator keeps the rank's untouched.
    generator = torch.Generator()
    if workers == 0:
        return iter(DataLoader(dataset, batch_size=None, generator=generator))
    prepare_workers()
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="forkserver",
        worker_init_fn=_live_and_die_with_rank,
        generator=generator,
    )
    return iter(loader)


def with_errors(items: Iterator[T]) -> Iterator[T | DataError]:
    """Yield items of a data set, and an error as the last one.

    Raised in a worker, it would leave the worker behind, and arrive with a traceback in its message.
    """
    try:
        yield from items
    except Exception as error:
        yield error if isinstance(error, DataError) else DataError(f"reading failed: {error!r}")


def reader_pids(parts: Iterator[Any]) -> list[int]:
    """Return the ids of the processes of `start_workers`."""
    return [process.pid for process in worker_processes(parts)]


def end_reading(parts: Iterator[Any]) -> None:
    """End the processes of `start_workers`; a stopped one would not hear that it is asked to."""
    processes = worker_processes(parts)
    if processes:
        shut_down_workers(parts)
    for process in processes:
        process.kill()


def kill_readers(parts: Iterator[Any]) -> None:
    """Kill the processes of `start_workers` of which one died: the others may wait for a lock that it held."""
    for process in worker_processes(parts):
        process.kill()


def _live_and_die_with_rank(_worker: int) -> None:
    keep_freed_memory()
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    # The loader's watchdog looks at the parent, which is the server here, and that lives while its children do.
    end_with_parent()
