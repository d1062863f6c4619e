"""Transformer Engine as megatron-core and users meet it: absent, broken, or on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from w2s.errors import MissingPackageError
from w2s.megatron.fp8 import transformer_engine
from w2s.megatron.fp8.fp8_formats import block_scale, current_scale

REPORT = """
import sys, torch
torch.cuda.is_available = lambda: {gpu}
import w2s.megatron.model.tower
from w2s.errors import W2SError
from w2s.megatron.fp8 import transformer_engine
from megatron.core import fp8_utils
try:
    transformer_engine.require()
    print("required: fine")
except W2SError as error:
    print(f"required: {{error}}")
print("problem:", transformer_engine.load_error())
print("megatron goes without:", not fp8_utils.HAVE_TE)
print("modules:", [name for name, module in sys.modules.items() if name.startswith("transformer_engine") and module])
"""


def look(package: Path, gpu: bool) -> dict[str, str]:
    """What a new process says that has `package` on its path."""
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", REPORT.format(gpu=gpu)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


def fake(folder: Path, error: str) -> Path:
    """A Transformer Engine whose PyTorch part fails as builds for another torch do; it says that it was imported."""
    package = folder / "transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(folder / 'imported')!r}, 'w').close()\n")
    (package / "pytorch" / "__init__.py").write_text(f"raise {error}\n")
    return folder


def test_a_broken_one_is_one_line_and_megatron_goes_without(tmp_path: Path) -> None:
    seen = look(fake(tmp_path, "RuntimeError('undefined symbol: cublasLtFoo\\nand more')"), gpu=True)
    assert (tmp_path / "imported").exists()
    assert seen["problem"] == "undefined symbol: cublasLtFoo"
    assert seen["required"].startswith(
        "Transformer Engine is installed but cannot be loaded (undefined symbol: cublasLtFoo): install the release"
    )
    assert seen["required"].endswith("or use precision.linear=local and precision.fp8=none")
    assert (seen["modules"], seen["megatron goes without"]) == ("[]", "True")


def test_without_a_gpu_it_is_not_imported(tmp_path: Path) -> None:
    seen = look(fake(tmp_path, "RuntimeError('imported')"), gpu=False)
    assert not (tmp_path / "imported").exists()
    assert (seen["modules"], seen["megatron goes without"]) == ("[]", "True")


@pytest.mark.parametrize(
    "error",
    [
        OSError("libcudnn.so.9: cannot open\nat all"),
        ImportError("libcudnn.so.9: cannot open"),
        AssertionError("libcudnn.so.9: cannot open"),  # as where the releases of its packages are not the same
    ],
)
def test_whatever_it_fails_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.syspath_prepend(str(fake(tmp_path, "NotImplementedError")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformer_engine, "_problems", [])
    monkeypatch.setattr(transformer_engine, "import_module", Mock(side_effect=error))
    monkeypatch.setitem(sys.modules, "transformer_engine", None)  # so that it is put back
    transformer_engine.load_or_hide()
    assert transformer_engine.load_error() == "libcudnn.so.9: cannot open"


def test_without_it_nothing_is_imported() -> None:
    transformer_engine.load_or_hide()
    assert transformer_engine.load_error() is None and not [
        name for name in sys.modules if name.startswith("transformer_engine")
    ]
    with pytest.raises(MissingPackageError, match="Transformer Engine is not installed: pip install"):
        transformer_engine.require()


class Linear(nn.Linear):
    """What is read of Transformer Engine's linear (release 2.12)."""

    parallel_mode, sequence_parallel, tp_size, tp_group = "column", False, 2, None

    def __init__(self) -> None:
        super().__init__(256, 128, bias=False)
        scales = {"scaling_fwd": torch.tensor([2.0, 3.0, 5.0]), "scaling_bwd": torch.tensor([7.0, 11.0])}
        self.fp8_meta = {name: SimpleNamespace(scale=scale) for name, scale in scales.items()}

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_what_it_rounds_is_looked_at_with_the_scales_of_its_recipe(recipe: str) -> None:
    linear, seen = Linear(), {}

    def record(kind: str, tensor: Tensor, scale: Tensor, dtype: torch.dtype, copies: int) -> None:
        seen[kind] = (tensor.clone(), scale, dtype, copies)

    x, gradient = torch.randn(48, 1, 256), torch.randn(48, 1, 128)
    handle = transformer_engine.record_with(linear, SimpleNamespace(fp8="hybrid", fp8_recipe=recipe), record)
    linear(x.requires_grad_())[0].backward(gradient)
    handle.remove()
    linear(2 * x)
    matrices = {"input": x.view(48, 256), "weight": linear.weight, "gradient": gradient.view(48, 128)}
    assert seen.keys() == matrices.keys()
    delayed = {"input": 2.0, "weight": 3.0, "gradient": 7.0}
    for kind, (tensor, scale, dtype, copies) in seen.items():
        assert torch.equal(tensor, matrices[kind])
        assert dtype == (torch.float8_e5m2 if kind == "gradient" else torch.float8_e4m3fn)
        assert copies == (2 if kind == "input" else 1)  # every rank of a column-parallel linear has the whole input
        expected: dict[str, Any] = {
            "delayed": torch.tensor(delayed[kind]),
            "tensorwise": current_scale(tensor, dtype, None),
            "blockwise": block_scale(tensor, dtype, rows=128 if kind == "weight" else 1),
        }
        assert torch.equal(scale, expected[recipe])


def test_fp8_weights_forget_what_they_were_made_with() -> None:
    linear = Linear()
    weight: Any = linear.weight
    weight.get_high_precision_init_val, weight.clear_high_precision_init_val = Mock(), Mock()
    clear = weight.clear_high_precision_init_val
    transformer_engine.clear_high_precision_init(linear)
    clear.assert_called_once()
    assert not hasattr(weight, "get_high_precision_init_val")  # Megatron asks whoever has it
