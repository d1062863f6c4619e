"""Triton that is not there: the Python around its kernels runs, and the bytes that they move are counted."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from torch import Tensor


class _Kernel:
    """A kernel that does nothing but tell what it would read and write."""

    def __init__(self, launched: Callable[[list[Tensor]], None]) -> None:
        self._launched = launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self._launched([each for each in args if isinstance(each, Tensor)])


@contextmanager
def stand_in_for_triton(launched: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Let `import triton` give kernels that do nothing but hand their tensors to `launched`."""
    language, triton = ModuleType("triton.language"), ModuleType("triton")
    language.constexpr = lambda value=None: value  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    triton.jit = lambda function: _Kernel(launched)  # type: ignore[attr-defined]
    triton.cdiv = lambda a, b: -(-a // b)  # type: ignore[attr-defined]
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"triton": triton, "triton.language": language}):
        yield
