"""Fused operators against their definitions in float64: plain ones, Triton's in its interpreter, and on a GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import DEFINITION, DTYPES, PLAIN, fused, inputs, results
from w2s.kernels.gelu import Activation, bias_gelu, bias_gelu_tanh, bias_quick_gelu

ERRORS = {"fp32": 2**-21, "bf16": 2**-7}
"""Largest error beside the largest value: a few roundings of 2^-24; of 2^-9 each where the inputs of a sum are rounded
too. Triton's interpreter cuts bfloat16 off where a GPU rounds, which errs twice as much."""

cases = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in PLAIN for kind in DTYPES])


def assert_close(ours: list[Tensor], name: str, kind: str) -> None:
    exact = results(DEFINITION[name], [tensor.double() for tensor in inputs(name, DTYPES[kind])])
    assert len(ours) == len(exact)
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == DTYPES[kind]
        error = (value.cpu().double() - reference).abs().max() / reference.abs().max()
        assert error < ERRORS[kind]


@cases
def test_plain_is_the_definition(name: str, kind: str) -> None:
    assert_close(results(PLAIN[name], inputs(name, DTYPES[kind])), name, kind)


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _by_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


# 1 + tanh(u) loses digits where u is negative: twice the error.
@pytest.mark.parametrize(("ours", "definition", "times"), [(bias_quick_gelu, _quick, 1), (bias_gelu_tanh, _by_tanh, 2)])
@pytest.mark.parametrize("kind", DTYPES)
def test_other_gelus_are_their_definitions(
    ours: Activation, definition: Callable[..., Tensor], times: int, kind: str
) -> None:
    """They have no Triton kernel."""
    tensors = inputs("gelu", DTYPES[kind])
    exact = results(lambda hidden, bias: definition(hidden + bias), [tensor.double() for tensor in tensors])
    for value, reference in zip(results(lambda *x: ours(*x)[0], tensors), exact, strict=True):
        assert (value.double() - reference).abs().max() / reference.abs().max() < times * ERRORS[kind]


@pytest.mark.parametrize("ours", [bias_gelu, bias_gelu_tanh, bias_quick_gelu])
def test_an_activation_can_be_computed_again(ours: Activation) -> None:
    """From the one tensor that is kept for the backward pass."""
    hidden, bias, _ = inputs("gelu", torch.float32)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, recompute = ours(hidden.requires_grad_(), bias.requires_grad_())
    assert [tensor.shape for tensor in saved if tensor.ndim] == [hidden.shape]
    again = recompute()
    assert torch.equal(again, output) and not again.requires_grad
    assert torch.equal(ours(hidden + bias, None)[0], output)  # of a linear that has added its bias


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Tensor]]:
    """What the Triton kernels give in Triton's interpreter, which has to be chosen before Triton is imported."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    file = tmp_path_factory.mktemp("triton") / "results.pt"
    command = [sys.executable, "-m", "tests.kernels.cases", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    return dict(torch.load(file))


@cases
def test_triton_is_the_definition(interpreted: dict[tuple[str, str], list[Tensor]], name: str, kind: str) -> None:
    assert_close(interpreted[name, kind], name, kind)


@pytest.mark.gpu
@cases
def test_triton_is_the_definition_on_a_gpu(name: str, kind: str) -> None:
    assert_close(results(fused(name), [tensor.cuda() for tensor in inputs(name, DTYPES[kind])]), name, kind)
