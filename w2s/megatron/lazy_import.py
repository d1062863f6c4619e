"""Megatron-Core without torch's compiler, until something is compiled.

Megatron-Core decorates functions with torch.compile when it is imported, and torch then imports dynamo and inductor: a
third of the time in which a command starts, for functions that a run may never call.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch


def import_megatron(name: str = "megatron.core") -> None:
    """Import Megatron-Core; what it decorates with torch.compile is compiled when it is called first."""
    compile_now = torch.compile
    torch.compile = _compile_at_first_call  # type: ignore[assignment]
    try:
        import_module(name)
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
