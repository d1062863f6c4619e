"""Transformer Engine: the only module that imports it.

Megatron-Core imports it wherever it is installed, and dies of an installation that fails with anything but ImportError.
So `load_or_hide`, when `w2s.megatron` is first imported, loads it where a GPU could use it, and hides it where that
fails or where there is no GPU.
"""

import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from w2s.config import gpu
from w2s.errors import MissingPackageError
from w2s.megatron.fp8.fp8_formats import FORWARD, GRADIENTS, Record, block_scale, current_scale, sampled

_NAME = "transformer_engine"

_problems: list[str] = []


def load_or_hide() -> None:
    """Load Transformer Engine if it is installed and this machine has a GPU; otherwise hide it from Megatron-Core."""
    if not gpu.transformer_engine_installed() or _problems:
        return
    if not torch.cuda.is_available():
        _hide("there is no GPU")
        return
    try:
        import_module(f"{_NAME}.pytorch")
    except Exception as error:  # a build for another torch, parts of several releases: each fails its own way
        _hide(str(error).partition("\n")[0] or type(error).__name__)


def load_error() -> str | None:
    """Return why Transformer Engine, which is installed, could not be loaded; None where it could."""
    return _problems[0] if _problems else None


def require() -> None:
    """Refuse to continue without Transformer Engine.

    Raises:
        MissingPackageError: it is not installed, or broken.
    """
    if not gpu.transformer_engine_installed():
        raise MissingPackageError("Transformer Engine is not installed: pip install 'w2s[gpu]'")
    if _problems:
        raise MissingPackageError(
            f"Transformer Engine is installed but cannot be loaded ({_problems[0]}): install the release that was "
            f"built for torch {torch.__version__}, or use precision.linear=local and precision.fp8=none"
        )


def _hide(reason: str) -> None:
    _problems.append(reason)
    for name in [name for name in sys.modules if name.partition(".")[0] == _NAME]:
        del sys.modules[name]
    # Whoever asks for it next is told that there is none.
    sys.modules[_NAME] = None  # type: ignore[assignment]


def column_linear(bf16: bool) -> type:
    """Return Transformer Engine's column-parallel linear as Megatron wraps it; `bf16` stays without FP8."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return _without_fp8(TEColumnParallelLinear) if bf16 else TEColumnParallelLinear


def row_linear(bf16: bool) -> type:
    """Return Transformer Engine's row-parallel linear as Megatron wraps it; `bf16` stays without FP8."""
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    return _without_fp8(TERowParallelLinear) if bf16 else TERowParallelLinear


@cache
def _without_fp8(base: type) -> type:
    """Return a linear that leaves the FP8 that its block asks for."""
    te = import_module(f"{_NAME}.pytorch")

    class Bf16Linear(base):
        stays_bf16 = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with te.quantized_model_init(enabled=False):
                super().__init__(*args, **kwargs)

        def forward(self, x: Tensor) -> Any:
            with te.autocast(enabled=False):
                return super().forward(x)

    return Bf16Linear


def fp8_linears(module: nn.Module, config: Any) -> list[Any]:
    """Return the linears of a module that multiply in FP8 under Megatron's configuration of it."""
    if config.fp8 is None:
        return []
    from megatron.core.extensions.transformer_engine import TELinear

    return [part for part in module.modules() if isinstance(part, TELinear) and not hasattr(part, "stays_bf16")]


def record_with(linear: Any, config: Any, record: Record) -> Any:
    """Tell `record` of the first input, weight and gradient that a linear rounds to FP8, until the handle is removed.

    Transformer Engine does the rounding inside of its kernels: here the tensors are looked at from outside, with the
    scale that its recipe takes (read in release 2.12).
    """

    def scale(kind: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if config.fp8_recipe == "delayed":
            from w2s.megatron.compat import delayed_scale  # with Megatron-Core, which `load_or_hide` comes before

            return delayed_scale(linear, kind)
        if config.fp8_recipe == "blockwise":
            return block_scale(sampled(tensor), dtype, rows=128 if kind == "weight" else 1)
        return current_scale(
            tensor, dtype, linear.tp_group if is_replicated(kind) and linear.sequence_parallel else None
        )

    def is_replicated(kind: str) -> bool:
        """Whether ranks hold the same tensor, or with sequence parallelism parts of it."""
        return kind == ("input" if linear.parallel_mode == "column" else "gradient")

    recorded: set[str] = set()

    def look(kind: str, tensor: Tensor) -> None:
        if kind in recorded:
            return
        recorded.add(kind)
        dtype = GRADIENTS[config.fp8] if kind == "gradient" else FORWARD
        matrix = tensor.detach().flatten(0, -2)
        copies = linear.tp_size if is_replicated(kind) and not linear.sequence_parallel else 1
        record(kind, sampled(matrix), scale(kind, matrix, dtype), dtype, copies)

    def after(_: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> None:
        look("input", inputs[0])
        look("weight", linear.weight)
        if outputs[0].requires_grad and "gradient" not in recorded:
            outputs[0].register_hook(lambda gradient: look("gradient", gradient))

    return linear.register_forward_hook(after)


def clear_high_precision_init(module: nn.Module) -> None:
    """Let FP8 weights forget the values that Transformer Engine made them with: ours have taken their place.

    Megatron's optimizer would make its master weights of them; it takes those of the FP8 weights where there are none.
    """
    for parameter in module.parameters():
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()
            for name in ("clear_high_precision_init_val", "get_high_precision_init_val"):
                delattr(parameter, name)
