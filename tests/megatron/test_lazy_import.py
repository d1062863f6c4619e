"""Megatron-Core without the compiler, until something is compiled."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from w2s.megatron.lazy_import import import_megatron

REPORT = """
import sys, torch.distributed.checkpoint  # with which torch 2.8 imports it itself
before = set(sys.modules)
import w2s.megatron.model.tower
print([name for name in sys.modules if name.startswith("torch._inductor") and name not in before])
"""
DECORATED = """
import torch

@torch.compile
def double(number):
    return 2 * number

@torch.compile(dynamic=True)
def half(number):
    return number // 2
"""


def test_the_compiler_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", REPORT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_called_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[dict[str, Any]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return lambda number: -function(number)

    (tmp_path / "w2s_decorated.py").write_text(DECORATED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", compile_now)
    import_megatron("w2s_decorated")
    decorated = sys.modules.pop("w2s_decorated")
    assert torch.compile is compile_now
    assert compiled == []
    assert [decorated.double(2), decorated.double(3), decorated.half(8)] == [-4, -6, -4]
    assert compiled == [{}, {"dynamic": True}]
