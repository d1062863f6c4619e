"""Private names of torch, pickle and timm, which a new release may change: the only place that says them.

What Megatron-Core and Transformer Engine keep for themselves is in `w2s/megatron/compat.py`. `tests/test_compat.py`
tries each, and finds private names elsewhere.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.autograd import Variable
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed import _coalescing_manager as coalescing_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "coalescing_manager",
    "tree_leaves",
    "unset_fake_temporarily",
]

READ_SCALAR: Any = torch.ops.aten._local_scalar_dense.default
"""The operator behind `Tensor.item()`."""
TENSOR_FUNCTIONS: dict[str, Any] = {"torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2}
"""What pickles of tensors name beside their storages."""
LAYOUT_FUNCTIONS: dict[str, Any] = {"torch.serialization._get_layout": torch.serialization._get_layout}
"""What pickles of a tensor's properties name."""
STORAGE_FROM_BYTES = "torch.storage._load_from_bytes"
"""The function that a pickled tensor names for its values."""
SCRIPTED_LISTS = "torch.jit._pickle"
"""The module whose functions make the lists of one type that a pickle of TorchScript names."""
NOT_A_TORCH_FILE = "_use_new_zipfile_serialization"
"""What torch's error says of a file that `torch.load(mmap=True)` does not know."""

PythonUnpickler: Any = pickle._Unpickler
"""The unpickler that is written in Python."""
TorchFileReader: Any = torch._C.PyTorchFileReader
"""Reads the records of an archive of torch."""


def storage_types() -> dict[str, torch.dtype]:
    """Return types of numbers by torch's names of their storages."""
    return torch.storage._storage_type_to_dtype_map()


def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    """Return bytes as numbers of a type, without torch's warning that this class is going to be removed."""
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return what tells a storage from others that live at the same time; fake ones have no address."""
    return storage._cdata


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of a [m, k] and b [k, n], both in FP8, as `dtype`; the scales are what each is divided by."""
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


def after_backward(callback: Callable[[], None]) -> None:
    """Have a function called when the backward pass that runs now has ended."""
    Variable._execution_engine.queue_callback(callback)


def run_backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Do what `torch.autograd.backward` does, without asking modes that answer for it."""
    Variable._execution_engine.run_backward(
        tuple(tensors), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def no_function_modes() -> AbstractContextManager[None]:
    """Inside, torch asks no function mode."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def function_modes() -> list[Any]:
    """Return the function modes that are active, the innermost last."""
    return list(torch.overrides._get_current_function_mode_stack())


def parse_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, bool, Any]:
    """Return what the arguments of `Tensor.to` ask for: device, type, whether to wait for it, and memory format."""
    return torch._C._nn._parse_to(*args, **kwargs)


def mutates(operator: Any) -> bool:
    """Return whether an operator writes into what it is given."""
    return bool(operator._schema.is_mutable)


def apply_to_own_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put what a function makes of a module's own parameters and buffers in their places."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            value = change(parameter)
        if value is not parameter:
            changed = nn.Parameter(value, parameter.requires_grad)
            changed.__dict__.update(parameter.__dict__ | changed.__dict__)
            module._parameters[name] = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)


MODULE_APPLY = "_apply"
"""The method of a module behind `to`, `cuda` and `float`."""


def process_groups() -> list[ProcessGroup]:
    """Return the process groups that this rank belongs to, in the order in which they were made."""
    return list(distributed_c10d._world.pg_map)


def world_group() -> ProcessGroup:
    """Return the process group of all ranks."""
    return distributed_c10d._get_default_group()


def group_name(group: ProcessGroup) -> str:
    """Return the name under which torch knows a process group."""
    return distributed_c10d._world.pg_names[group]


def fake_store() -> Any:
    """Return a store of ranks that are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # imports much that tests need

    return FakeStore()


def worker_processes(batches: Iterator[Any]) -> list[Any]:
    """Return the processes of a DataLoader's iterator; none where it has none."""
    return list(getattr(batches, "_workers", ()))


def shut_down_workers(batches: Iterator[Any]) -> None:
    """Ask the processes of a DataLoader's iterator to end, and wait for them."""
    batches._shutdown_workers()  # type: ignore[attr-defined]


def record_cuda_memory(most: int | None) -> None:
    """Let CUDA's allocator keep its last events, `most` of them; None ends that."""
    torch.cuda.memory._record_memory_history(**({"enabled": None} if most is None else {"max_entries": most}))


def write_cuda_memory(path: str) -> None:
    """Write the events of CUDA's allocator that were kept."""
    torch.cuda.memory._dump_snapshot(path)


def positioned(trunk: nn.Module, patches: Tensor) -> Any:
    """Return the patches of a timm transformer with its first tokens and positions; Eva's rotary ones too."""
    return trunk._pos_embed(patches)  # type: ignore[operator]
