"""Megatron-Core on a machine without a GPU.

Megatron-Core asks for CUDA by name in a few dozen places (devices, streams, tensor type names). On a CPU this module
answers those questions; with a GPU it does nothing. `enable` is the only switch and may be called more than once.

Most answers are given by a function mode, which torch asks at every call from Python. A training step names a device in
one place alone, so it goes without the mode: see `without_function_mode`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from w2s.compat import coalescing_manager, function_modes, no_function_modes
from w2s.megatron import compat


class _Stream:
    """A CUDA stream on a machine that has none: everything is already in order."""

    def __init__(self, *unused: Any, **unused_too: Any) -> None:
        """Take what a CUDA stream takes."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Return at once: there is nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """Return an event that has come."""
        return event or _Event()

    def synchronize(self) -> None:
        """Return at once: there is nothing to wait for."""


class _Event:
    """A CUDA event on a machine that has none: it has come."""

    def record(self, stream: Any = None) -> None:
        """Take note of nothing."""

    def query(self) -> bool:
        """Say that it has come."""
        return True

    def wait(self, stream: Any = None) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class CudaOnCpu(TorchFunctionMode):
    """Turns `device="cuda"` and `.cuda()` into the CPU and gives tensor types their CUDA names."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` with every CUDA device among its arguments replaced by the CPU."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device and args and _is_cuda(args[0]):
            return torch.device("cpu")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron picks its buckets by names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _TorchOnCpu:
    """What Megatron's schedules know as torch: the only thing in a step that they name a device for is on the CPU."""

    def __getattr__(self, name: str) -> Any:
        """Return what torch has of that name."""
        return getattr(torch, name)

    def zeros(self, *size: Any, device: Any = None, **settings: Any) -> torch.Tensor:
        """Return a tensor of zeros, whatever the device, unless another mode answers for it."""
        return torch.zeros(*size, device=None if _is_only_mode() else device, **settings)


class NoRngTracker:
    """Stands in for Megatron's tracker of CUDA random states: our towers draw nothing inside the layers."""

    @contextlib.contextmanager
    def fork(self, name: str = "") -> Iterator[None]:
        """Leave the random state as it is."""
        yield

    def is_initialized(self) -> bool:
        """Say that the states are set, or Megatron refuses to run."""
        return True

    def get_states(self) -> dict[str, Any]:
        """Return no states: there is nothing to save."""
        return {}

    def set_states(self, states: dict[str, Any]) -> None:
        """Take nothing back."""


@contextlib.contextmanager
def _coalesced_and_waited(*arguments: Any, **settings: Any) -> Iterator[Any]:
    """Exchange together what is exchanged inside, and wait for it."""
    with coalescing_manager(*arguments, **settings) as exchanged:
        yield exchanged
    exchanged.wait()


_enabled: list[CudaOnCpu] = []


def enable() -> None:
    """Let Megatron-Core run on this machine's CPU; does nothing where there is a GPU or when already enabled."""
    if torch.cuda.is_available() or _enabled:
        return
    cpu = torch.device("cpu")
    stand_ins = {
        "current_device": lambda: cpu,
        "current_stream": lambda *_: _Stream(),
        "Stream": _Stream,  # a type: others write `torch.cuda.Stream | None`
        "stream": lambda _: contextlib.nullcontext(),
        "Event": _Event,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "FloatTensor": lambda values: torch.tensor(values, dtype=torch.float),
        "IntTensor": lambda values: torch.tensor(values, dtype=torch.int),
    }
    compat.answer_for_cuda(stand_ins)
    compat.ignore_rng_states()
    # FSDP orders what it frees and what is still on its way by streams, of which there are none.
    compat.coalesce_with(_coalesced_and_waited)
    compat.replace_torch_of_schedules(_TorchOnCpu())
    mode = CudaOnCpu()
    mode.__enter__()
    _enabled.append(mode)


def without_function_mode() -> contextlib.AbstractContextManager[None]:
    """Inside, `CudaOnCpu` is not asked: for training steps, where its answers would cost more than a norm.

    Where there are other modes too, such as a rehearsal's, all are asked as before.
    """
    return no_function_modes() if _is_only_mode() else contextlib.nullcontext()


def _is_only_mode() -> bool:
    """Whether `CudaOnCpu` is the only function mode."""
    return bool(_enabled) and function_modes() == _enabled
