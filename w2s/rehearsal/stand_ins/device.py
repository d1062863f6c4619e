"""A GPU that is not there: tensors that would lie on it are told apart, and waits of the host for it are noted.

Fake tensors of type `cuda` fail in autograd on a build of torch without CUDA, so all are of type `cpu`. Which of them
would be on the GPU is kept beside them, by storage.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from w2s import compat
from w2s.compat import FakeTensor, storage_key
from w2s.rehearsal.stand_ins.meter import Meter
from w2s.rehearsal.stand_ins.streams import Streams

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_RMS_NORMS = (torch.rms_norm, nn.functional.rms_norm)
_FETCHES = {torch.Tensor.cpu: "cpu()", torch.Tensor.numpy: "numpy()"}


class FakeGpu(TorchFunctionMode):
    """Answers for the device of a tensor, and follows tensors onto it and off it."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` as on a machine with a GPU."""
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return GPU if args and str(args[0]).startswith("cuda") else func(*args, **kwargs)
        if func is torch.Tensor.data_ptr:
            return storage_key(args[0].untyped_storage()) + args[0].storage_offset()
        if func in _FETCHES:
            return self._fetched(args[0], _FETCHES[func])
        if func is torch.Tensor.cuda:
            return self._moved(args[0], args[0])
        if func is torch.Tensor.to:
            return self._to(func, args, kwargs)
        if func in _RMS_NORMS and self._meter.on_gpu(args[0]):
            return self._rms_norm(*args, **kwargs)
        return self._made(func, args, kwargs)

    def _rms_norm(self, hidden: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Any:
        """As the one kernel that a GPU has for it, which keeps its input as it is; a CPU takes steps in float32."""
        return _RmsNorm.apply(hidden, weight, self._meter.launched)

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, others = args[0], args[1:]
        kwargs = {name: value for name, value in kwargs.items() if name != "copy"}
        if others and isinstance(others[0], Tensor):
            others = (others[0].device, others[0].dtype, *others[1:])
        device, dtype, at_leisure, form = compat.parse_to(*others, **kwargs)
        wanted = {name: value for name, value in (("dtype", dtype), ("memory_format", form)) if value is not None}
        converted = func(tensor, **wanted) if wanted else tensor
        if device is None:
            return converted
        if device.type == "cuda" or _called_by_torch():
            return self._moved(tensor, converted)
        return self._meter.off_gpu(converted) if at_leisure else self._fetched(converted, "to(cpu)")

    def _moved(self, before: Tensor, tensor: Tensor) -> Tensor:
        return tensor if self._meter.on_gpu(before) else self._meter.onto_gpu(tensor)

    def _fetched(self, tensor: Tensor, how: str) -> Any:
        if not self._meter.on_gpu(tensor):
            return tensor.numpy() if how == "numpy()" and not isinstance(tensor, FakeTensor) else tensor
        self._meter.host_waits(how)
        return self._meter.off_gpu(tensor)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what may make a tensor on the GPU."""
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        kwargs["device"] = CPU
        with self._meter.making():
            return func(*args, **kwargs)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, launched: Callable[[list[Tensor]], None]) -> Tensor:
        out, inverse = torch.empty_like(hidden), hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, inverse)
        ctx.launched = launched
        launched([hidden, out])
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        hidden, weight, _ = ctx.saved_tensors
        ctx.launched([hidden, outputs[0], hidden])
        return torch.empty_like(hidden), torch.empty_like(weight), None


def _called_by_torch() -> bool:
    """Whether the call that is answered stands in torch, which takes devices from fake tensors at times."""
    return "/torch/" in sys._getframe(3).f_code.co_filename


@contextmanager
def stand_in_for_cuda(meter: Meter, streams: Streams) -> Iterator[None]:
    """Let torch's host side answer as with one GPU, whose tensors `meter` knows, and which has `streams`."""

    def on_gpu(tensor: FakeTensor) -> bool:
        """Torch's own work on fake tensors knows no GPU."""
        return "/torch/_" not in sys._getframe(2).f_code.co_filename and meter.on_gpu(tensor)

    def device(tensor: FakeTensor) -> torch.device:
        return GPU if on_gpu(tensor) else real_device(tensor)

    def is_cuda(tensor: FakeTensor) -> bool:
        return on_gpu(tensor)

    def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resized = real_resize(storage, size)
        meter.resized(storage)
        return resized

    real_device: Any = vars(FakeTensor)["device"].fget
    real_resize: Any = torch.UntypedStorage.resize_
    stand_ins = {
        "current_device": lambda: GPU,
        "set_device": lambda _: None,
        "current_stream": lambda *_: streams.current,
        "Stream": streams.Stream,
        "Event": streams.Event,
        "stream": streams.on,
        "synchronize": lambda *_: meter.host_waits("torch.cuda.synchronize()"),
    }
    with ExitStack() as undo:
        for name, stand_in in stand_ins.items():
            undo.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        undo.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize))
        undo.enter_context(mock.patch.object(nn.Module, compat.MODULE_APPLY, _apply))
        # Torch's own draws until it likes the numbers, of which there are none.
        undo.enter_context(mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **_: tensor))
        undo.enter_context(mock.patch.object(torch, "autocast", _autocast))
        undo.enter_context(mock.patch.object(torch.autograd, "backward", compat.run_backward))
        undo.enter_context(mock.patch.object(FakeTensor, "device", property(device)))
        undo.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(is_cuda), create=True))
        yield


def _autocast(device_type: str, *args: Any, **settings: Any) -> torch.autocast:
    return _real_autocast("cpu", *args, **settings)


_real_autocast = torch.autocast


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what torch's own does by swapping tensors, which fake ones do not take."""
    for child in module.children() if recurse else ():
        _apply(child, change)
    compat.apply_to_own_tensors(module, change)
    return module
