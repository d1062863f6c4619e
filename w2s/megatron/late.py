"""torch.compile without the compiler, until something is compiled.

Megatron-Core decorates functions with torch.compile when it is imported, and torch then imports dynamo and inductor: a
third of the time in which a command starts, for functions that a run may never call.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compiled_at_first_call() -> Iterator[None]:
    """Let what is decorated with torch.compile in here be compiled when it is called first."""
    compile_now = torch.compile
    torch.compile = _compile_at_first_call
    try:
        yield
    finally:
        torch.compile = compile_now


def _compile_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    if function is None:
        return functools.partial(_compile_at_first_call, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
