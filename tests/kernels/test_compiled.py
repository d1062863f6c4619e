"""The Triton kernels, compiled for a Hopper GPU without one: everything stays in registers, and a program fits."""

import re
import subprocess
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

WIDTHS = [1024, 1280, 1408, 1792, 4096, 5120]
"""Of the towers with RMSNorm or LayerNorm after a block in configs/model, and between them."""
REGISTERS = 65_536
"""Of a multiprocessor with compute capability 9.0 (NVIDIA, CUDA C++ Programming Guide, table of technical data)."""
SUMS = ("inverse", "grad_weight", "grad_bias")
"""Arguments in float32; all other tensors are bfloat16."""
NUMBERS = ("rows", "width", "eps")


def used(kernel: Any, launch: Mapping[str, int], folder: Path) -> dict[str, int]:
    """Registers of a thread and spilled bytes, as ptxas counts them for sm_90a."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    constants = {name: value for name, value in launch.items() if name != "num_warps"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in NUMBERS:
            return "fp32" if name == "eps" else "i32"
        return "*fp32" if name in SUMS else "*bf16"

    signature = {name: kind(name) for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, one in enumerate(signature.values()) if one[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": launch["num_warps"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = folder / "kernel.ptx"
    code.write_text(compiled.asm["ptx"])
    assert re.search(r"ld\.global\S*\.v[248]", compiled.asm["ptx"]), "several numbers are loaded at a time"
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", code, "-o", folder / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*Used (\d+) registers", told, re.DOTALL)
    assert found is not None, told
    return dict(zip(("stores", "loads", "registers"), map(int, found.groups()), strict=True))


def assert_in_registers(kernel: Any, launch: Mapping[str, int], folder: Path) -> None:
    found = used(kernel, launch, folder)
    assert found["stores"] == found["loads"] == 0
    assert found["registers"] * 32 * launch["num_warps"] <= REGISTERS


@pytest.mark.parametrize("width", WIDTHS)
def test_the_norms_kernels_stay_in_registers(width: int, tmp_path: Path) -> None:
    module = import_module("w2s.kernels.add_norm_triton")
    launch = module._launch(width)
    assert_in_registers(module._forward, launch, tmp_path)
    assert_in_registers(module._backward, {"ROWS": module.ROWS, **launch}, tmp_path)


@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_the_gelus_kernels_stay_in_registers(name: str, tmp_path: Path) -> None:
    module = import_module("w2s.kernels.gelu_triton")
    assert_in_registers(getattr(module, name), module._LAUNCH, tmp_path)


def test_a_kernel_that_does_not_fit_is_found(tmp_path: Path) -> None:
    """With twice the warps a thread of the widest norm has half the registers."""
    module = import_module("w2s.kernels.add_norm_triton")
    launch = {"ROWS": module.ROWS, **module._launch(5120), "num_warps": 32}
    assert used(module._backward, launch, tmp_path)["stores"] > 0
