"""A distributed checkpoint on its way to the disk: written at once, or by a process of its own."""

import multiprocessing
import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint import CheckpointException

from w2s.errors import FREE_SPACE, CheckpointError, W2SError
from w2s.files import Checksum, checksums
from w2s.megatron import compat
from w2s.megatron.parallel.process_groups import gather

_processes = multiprocessing.get_context("fork")


class AsyncSave:
    """Tensors that are being written into a folder; every rank makes one and finishes it.

    Args:
        folder: existing and empty.
        state: what is written, as it is now; it may change while a process of its own writes.
        background: write in a process of its own.
    """

    def __init__(self, folder: Path, state: dict[str, Any], background: bool) -> None:
        self._folder = folder
        self._process: Any = None
        self._results = _WriterResults(folder, background)
        compat.report_writing_to(self._results)
        with translated_write_errors(folder):
            self._request: AsyncRequest = compat.begin_save(state, str(folder))
            self._start(background)

    def _start(self, background: bool) -> None:
        write, arguments = self._request.async_fn, list(self._request.async_fn_args)
        if write is None:
            return
        if self._request.preload_fn is not None:
            arguments[1] = self._request.preload_fn()
        if background:
            # A fork has the memory of this moment.
            self._process = _processes.Process(target=write, args=arguments, kwargs=self._request.async_fn_kwargs)
            self._process.start()
        else:
            write(*arguments, **self._request.async_fn_kwargs)

    @property
    def written(self) -> bool:
        """Whether this rank has written its tensors, or failed to."""
        return self._process is None or not self._results.empty() or not self._process.is_alive()

    def writer_pids(self) -> list[int]:
        """Return the id of the process that writes, where there is one."""
        return [] if self._process is None else [self._process.pid]

    def abandon(self) -> None:
        """Kill what writes: nobody will finish it, and a process that is stopped would hold up the end of this one."""
        if self._process is not None:
            with suppress(psutil.NoSuchProcess):
                writer = psutil.Process(self._process.pid)
                for each in (writer, *writer.children(recursive=True)):
                    each.kill()

    def wait(self) -> None:
        """Wait until this rank has written its tensors, or its writer has died."""
        if self._process is not None:
            self._results.wait(self._process)

    def finish(self) -> dict[str, Checksum]:
        """Wait for all ranks and write what is known of all tensors together; every rank calls.

        Returns:
            The checksums of the files that this rank has written, taken where they were written.

        Raises:
            CheckpointError: the files cannot be written; on every rank.
            W2SError: a writing process was killed, on every rank; what the main rank writes alone is refused, there.
        """
        self.wait()
        for death in filter(None, gather(self._exit_reason())):
            raise W2SError(death)
        try:
            with translated_write_errors(self._folder):
                for finalize in self._request.finalize_fns:
                    finalize()
        except OSError as error:
            # On the main rank only, and the others wait for it: nobody can continue.
            raise W2SError(f"cannot write {self._folder} ({error.strerror}): {FREE_SPACE}") from error
        if self._process is not None:
            self._process.join()
        return self._results.files

    def _exit_reason(self) -> str:
        """How the writing process of this rank died, if it has left no report."""
        if self._process is None or not self._results.empty():
            return ""
        self._process.join()
        code = self._process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return (
            f"the process that wrote {self._folder} on rank {dist.get_rank()} {how}: see the system's log, often for "
            "memory; repeat the command to resume from the checkpoint before"
        )


class _WriterResults:
    """What Megatron's writer reports, with the checksums of this rank's files: from another process or from this one.

    Attributes:
        files: the checksums by name, once the report is taken.
    """

    def __init__(self, folder: Path, background: bool) -> None:
        self.files: dict[str, Checksum] = {}
        self._folder = folder
        self._queue: Any = _processes.SimpleQueue() if background else queue.SimpleQueue()
        self._got: list[Any] = []

    def put(self, result: Any) -> None:
        """Called by the writer when the files are there, and still in the system's memory."""
        try:
            files = checksums(self._folder.glob(f"__{dist.get_rank()}_*"))
        except OSError as error:
            result, files = error, {}
        self._queue.put((result, files))

    def empty(self) -> bool:
        return not self._got and self._queue.empty()

    def wait(self, process: Any) -> None:
        """Take the report, or find that the process died without one."""
        while not self._got and (process.is_alive() or not self._queue.empty()):
            if self._queue.empty():
                process.join(timeout=0.01)
            else:
                self._got.append(self._queue.get())

    def get_nowait(self) -> Any:
        if self.empty():
            raise queue.Empty
        result, self.files = self._got.pop() if self._got else self._queue.get()
        return result


@contextmanager
def translated_errors(action: str, fix: str) -> Iterator[None]:
    """Turn torch's CheckpointException, which is not an Exception and passes every handler, into an error of ours."""
    try:
        yield
    except CheckpointException as error:
        # One rank alone is told what happened where.
        cause = next((cause for cause, _ in error.failures.values()), "another rank failed")
        if isinstance(cause, W2SError):
            raise cause from error
        raise CheckpointError(f"cannot {action} ({' '.join(str(cause).split())}): {fix}") from error


def translated_write_errors(folder: Path) -> Any:
    """Report what goes wrong while a folder is written."""
    return translated_errors(f"write {folder}", FREE_SPACE)
