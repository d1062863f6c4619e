"""A thread that makes slow calls in order, so that the training loop never waits for them."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Worker:
    """Runs calls one after the other in a daemon thread.

    `concurrent.futures` has no daemon threads: with its executor a call that hangs would keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Queues a call; its result or its exception is in the future."""
        future: Future[Any] = Future()
        self._calls.put((future, call, arguments))
        return future

    def _run(self) -> None:
        while True:
            future, call, arguments = self._calls.get()
            try:
                future.set_result(call(*arguments))
            except Exception as error:
                future.set_exception(error)
