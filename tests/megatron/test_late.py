"""Megatron-Core without the compiler, until something is compiled."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from w2s.megatron.late import compiled_at_first_call


def test_the_compiler_is_not_imported() -> None:
    report = (
        "import sys, w2s.megatron.tower; print([name for name in sys.modules if name.startswith('torch._inductor')])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", report], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_called_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda number: -function(number)

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiled_at_first_call():

        @torch.compile
        def double(number: int) -> int:
            return 2 * number

        @torch.compile(dynamic=True)
        def half(number: int) -> int:
            return number // 2

    assert torch.compile is compile_now
    assert compiled == []
    assert [double(2), double(3), half(8)] == [-4, -6, -4]
    assert compiled == [{}, {"dynamic": True}]
