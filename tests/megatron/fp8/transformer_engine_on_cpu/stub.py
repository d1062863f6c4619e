"""A stand-in for Transformer Engine's C++ extension: products with real numbers, and of all else the names."""

import enum
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

DType = enum.IntEnum("DType", dict(kByte=0, kInt32=2, kFloat32=4, kFloat16=5, kBFloat16=6, kFloat8E4M3=7,
                                   kFloat8E5M2=8, kFloat4E2M1=10))  # fmt: skip
TYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


class FP8FwdTensors(enum.IntEnum):
    """Places of a module's tensors, as the extension numbers them."""

    GEMM1_INPUT = 0
    GEMM1_WEIGHT = 1
    GEMM1_OUTPUT = 2
    GEMM2_INPUT = 3
    GEMM2_WEIGHT = 4
    GEMM2_OUTPUT = 5
    GEMM3_INPUT = 6
    GEMM3_WEIGHT = 7
    GEMM3_OUTPUT = 8


class FP8BwdTensors(enum.IntEnum):
    """The same of gradients."""

    GRAD_OUTPUT1 = 0
    GRAD_INPUT1 = 1
    GRAD_OUTPUT2 = 2
    GRAD_INPUT2 = 3
    GRAD_OUTPUT3 = 4
    GRAD_INPUT3 = 5


FLOAT8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Round to FP8, as the matrix lies and transposed, by the scale that there is or by the largest magnitude."""
    assert noop is None
    out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if output is None else output
    CALLS["rounded"] += 1
    if hasattr(quantizer, "block_scaling_dim"):
        return _quantize_blocks(tensor.detach().float(), quantizer, out)
    dtype = FLOAT8[quantizer.dtype]
    largest, limit = tensor.detach().abs().amax().float(), torch.finfo(dtype).max
    if not hasattr(quantizer, "with_amax_reduction"):  # delayed: the scale is that of earlier steps
        quantizer.amax.copy_(torch.maximum(quantizer.amax, largest))
        scale = quantizer.scale
    else:
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = limit / largest
    rounded = (tensor.detach().float() * scale).clamp(-limit, limit).to(dtype)
    out._scale_inv.copy_(1 / scale)
    if out._data is not None:
        out._data.copy_(rounded.view(torch.uint8))
    if out._transpose is not None:
        transposed = rounded.view(torch.uint8).reshape(-1, tensor.shape[-1]).t()
        out._transpose.copy_(transposed.reshape(out._transpose.shape))
        out._transpose_invalid = False
    return out


def _quantize_blocks(tensor: Tensor, quantizer: Any, out: Any) -> Any:
    """Round each block of a matrix as it lies and, along its columns, transposed: scales are powers of two."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    for name, matrix in (("rowwise", rows), ("columnwise", rows.t())):
        data, inverse = getattr(out, f"_{name}_data"), getattr(out, f"_{name}_scale_inv")
        if data is not None:
            rounded, scales = _blocks(matrix, quantizer)
            data.copy_(rounded.reshape(data.shape))
            inverse.zero_()
            inverse[:, : scales.shape[1]].copy_(scales)
    return out


def _blocks(matrix: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """A matrix in FP8, and the inverse scales as the extension keeps them: those of a row of blocks in a column."""
    assert quantizer.force_pow_2_scales and not quantizer.amax_epsilon
    height, dtype = 128 if quantizer.block_scaling_dim == 2 else 1, FLOAT8[quantizer.dtype]
    (rows, columns), limit = matrix.shape, torch.finfo(dtype).max
    blocks = torch.nn.functional.pad(matrix, (0, -columns % 128, 0, -rows % height))
    blocks = blocks.reshape(-1, height, -(-columns // 128), 128)
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    scale = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(limit / largest))), 1.0)
    rounded = (blocks * scale).clamp(-limit, limit).to(dtype).view(torch.uint8)
    inverse = (1 / scale).squeeze(3).squeeze(1)
    rounded = rounded.reshape(blocks.shape[0] * height, -1)[:rows, :columns]
    return rounded, inverse if quantizer.block_scaling_dim == 2 else inverse.t()


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """The columns of a matrix, of which the last axis is the columns, as rows."""
    columns = data.reshape(-1, data.shape[-1]).t().reshape(data.shape[-1], *data.shape[:-1]).contiguous()
    return columns if out is None else out.copy_(columns)


def create_empty_quantized_tensor(quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, *_: Any) -> Any:
    """A tensor in FP8 without numbers; releases before 2.20 make it in Python."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.uint8, device=device)

    if hasattr(quantizer, "block_scaling_dim"):
        return _empty_blocks(quantizer, shape, dtype, empty)
    return Float8Tensor(
        shape=shape,
        dtype=dtype,
        data=empty(*shape) if quantizer.rowwise_usage else None,
        data_transpose=empty(shape[-1], *shape[:-1]) if quantizer.columnwise_usage else None,
        fp8_scale_inv=torch.empty(1, device=device),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
    )


def _empty_blocks(quantizer: Any, shape: list[int], dtype: torch.dtype, empty: Callable[..., Tensor]) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    sizes = {"rowwise": list(shape), "columnwise": quantizer.get_columnwise_shape(shape)}
    parts: dict[str, Tensor | None] = {}
    for name, size in sizes.items():
        used = getattr(quantizer, f"{name}_usage")
        scales = quantizer.get_scale_shape(shape, columnwise=name == "columnwise")
        parts[f"{name}_data"] = empty(*size) if used else None
        parts[f"{name}_scale_inv"] = empty(*scales).float() if used else None
    whole = {"shape": shape, "dtype": dtype, "fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    return Float8BlockwiseQTensor(**whole, **parts, is_2D_scaled=quantizer.block_scaling_dim == 2)


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: DType, margin: float
) -> None:
    """Take the largest magnitudes of a step into their histories, the newest first, and make scales of them."""
    place = 0
    for history, scale in zip(histories, scales, strict=True):
        count = history.shape[1]
        history[0].copy_(reduced[place : place + count])
        place += count
        largest = history.amax(0) if algorithm == "max" else history[0]
        scale.copy_(torch.where(largest > 0, torch.finfo(FLOAT8[dtype]).max / largest / 2**margin, scale))
        history.copy_(history.roll(-1, 0))
        history[0].zero_()


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient with respect to a bias, and the rounded gradient with respect to the output."""
    return gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(gradient.dtype), quantizer(gradient)


def _numbers(matrix: Any, columnwise: bool) -> Tensor:
    """A matrix in float32, whatever it is kept in; of blocks those along the columns, or along the rows."""
    if hasattr(matrix, "_rowwise_data"):
        return _of_blocks(matrix, "columnwise" if columnwise else "rowwise")
    if not hasattr(matrix, "_scale_inv"):
        assert matrix.dtype == torch.bfloat16
        return matrix.float()
    dtype = FLOAT8[matrix._fp8_dtype]
    if matrix._data is not None:
        return matrix._data.view(dtype).float() * matrix._scale_inv
    transposed = matrix._transpose.view(dtype).float() * matrix._scale_inv
    return transposed.reshape(transposed.shape[0], -1).t().reshape(*transposed.shape[1:], -1)


def _of_blocks(matrix: Any, name: str) -> Tensor:
    data, inverse = getattr(matrix, f"_{name}_data"), getattr(matrix, f"_{name}_scale_inv")
    rows = data.reshape(data.shape[0], -1) if name == "columnwise" else data.reshape(-1, data.shape[-1])
    height, width = rows.shape
    scales = inverse.repeat_interleave(128, 0) if matrix._is_2D_scaled else inverse.t()
    scales = scales[:height].repeat_interleave(128, 1)[:, :width]
    numbers = rows.view(FLOAT8[matrix._fp8_dtype]).float() * scales
    if name == "rowwise":
        return numbers.reshape(data.shape)
    return numbers.t().reshape(*data.shape[1:], data.shape[0])


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    *others: Any,
    **more: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """op(B) op(A), as cuBLAS sees row-major matrices; the gradient with respect to a bias is the sum of B's rows."""
    assert quantizer is None and not gelu
    # Its products sum over the axis that lies together: a factor that is given by columns has it transposed.
    left, right = _numbers(b, columnwise=transpose_b), _numbers(a, columnwise=not transpose_a)
    left, right = (each.reshape(-1, each.shape[-1]) for each in (left, right))
    product = (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)
    grad_bias = None
    if bias is not None and grad:
        grad_bias = left.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    shape = product.shape if transpose_b else (*b.shape[:-1], product.shape[-1])
    product = product.view(shape)
    CALLS["accumulated" if accumulate else "apart"] += 1
    if out is not None:
        assert out.shape == product.shape
        return out.copy_(out + product if accumulate else product), grad_bias, None, None
    return product.to(TYPES[int(out_dtype)] if out_dtype is not None else torch.bfloat16), grad_bias, None, None


UNUSED = ("einops", "onnx", "onnx.helper", "onnxscript", "onnxscript.function_libs")
"""What it imports, and linears need not."""

CALLS = {"accumulated": 0, "apart": 0, "rounded": 0}
"""Products that were made, by what became of them."""


FUNCTIONS = (
    generic_gemm,
    quantize,
    bgrad_quantize,
    fp8_transpose,
    create_empty_quantized_tensor,
    fused_amax_and_scale_update_after_reduction,
)


class _Names(type):
    """A class of the extension that nobody makes anything of: any attribute is some number."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return len(name)


def install(folder: Path) -> None:
    """Let `import transformer_engine` find the release that is unpacked in a folder, over this stand-in.

    Call it before anything imports Megatron-Core.
    """
    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_FRAMEWORK": "pytorch"}
    sys.path.insert(0, str(folder))
    sys.modules["transformer_engine_torch"] = _extension(folder / "transformer_engine")
    for name in UNUSED:
        if name.partition(".")[0] in sys.modules or importlib.util.find_spec(name) is None:
            module = MagicMock()
            module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
            sys.modules[name] = module
    card = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="stand-in", total_memory=80 << 30)
    torch.cuda.get_device_properties = lambda *_: card
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    torch.version.cuda = torch.version.cuda or "13.0"
    # Its own modules are loaded as on a machine with a GPU, and w2s takes it for one as long.
    real, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        import transformer_engine.pytorch  # noqa: F401

        import w2s.megatron  # noqa: F401
    finally:
        torch.cuda.is_available = real


def prepare(folder: Path) -> None:
    """Take out of an unpacked release what loads its libraries, and what asks for a GPU."""
    root = folder / "transformer_engine"
    common, base = root / "common" / "__init__.py", root / "pytorch" / "module" / "base.py"
    loads = "def load_framework_extension(framework: str) -> None:"
    text = common.read_text()
    assert loads in text
    common.write_text(text.replace(loads, f"{loads}\n    return\n\n\ndef _left_out(framework: str) -> None:", 1))
    text = base.read_text()
    for asks, instead in (
        ('assert inp.is_cuda, "TransformerEngine needs CUDA."', "pass"),
        ("if not inp.is_cuda:", "if False:"),
        ("if not torch.cuda.is_available():", "if False:"),
        ('assert torch.cuda.is_available(), "TransformerEngine needs CUDA."', "pass"),
    ):
        text = text.replace(asks, instead)
    base.write_text(text)


def _extension(root: Path) -> types.ModuleType:
    module: Any = types.ModuleType("transformer_engine_torch")
    module.DType, module.FP8FwdTensors, module.FP8BwdTensors = DType, FP8FwdTensors, FP8BwdTensors
    for function in FUNCTIONS:
        setattr(module, function.__name__, function)
    attention = (root / "pytorch" / "cpp_extensions" / "fused_attn.py").read_text()
    named = re.findall(r"NVTE_Fused_Attn_Backend\.(NVTE_\w+)", attention)
    backends = dict.fromkeys(name for name in named if name != "NVTE_No_Backend")
    module.NVTE_Fused_Attn_Backend = enum.IntEnum(
        "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, **{name: place for place, name in enumerate(backends)}}
    )
    known = {
        "get_cublasLt_version": 130000,
        "get_num_cublas_streams": 4,
        "get_stream_priority_range": (0, -5),
        "ubuf_built_with_mpi": False,
        "device_supports_multicast": False,
        "get_cudnn_version": 91300,
    }
    for name, value in known.items():
        setattr(module, name, lambda *_, value=value: value)

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            setattr(module, name, _Names(name, (), {}))
            return getattr(module, name)

        def called(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name}")

        return called

    module.__getattr__ = missing
    return module  # type: ignore[no-any-return]
