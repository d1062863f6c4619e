"""What a rank's operators need: bytes of its GPU, and seconds as the planner reckons them."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w2s.bench.marks import Parts
from w2s.compat import (
    READ_SCALAR,
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    mutates,
    storage_key,
    tree_leaves,
)
from w2s.planning.time.cards import Card
from w2s.planning.time.roofline import moving, product
from w2s.rehearsal.stand_ins.where import line
from w2s.rehearsal.tape import HostWait, Tape

aten = torch.ops.aten
_FREE = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach, aten.alias,
    aten.set_, aten.resize_,
)  # fmt: skip
_ATTENTION = ("scaled_dot_product",)


@dataclass(frozen=True)
class Rise:
    """The fullest moment of some work, beyond what was allocated when it began."""

    size: int
    """Bytes."""
    parts: Counter[str]
    """The same by the part of the step that allocated them."""
    where: str
    """The line of code."""


class Meter(TorchDispatchMode):
    """Follows the tensors on the GPU, and adds what operators take to a tape, by the part of the step that is open.

    Attributes:
        now: bytes that are allocated on the GPU.
        peak: the most since it was last set.
        parts: bytes by the part of the step that allocated them, at the peak.
        where: the line of code at the peak.
        fake: the mode that makes tensors without numbers.
    """

    def __init__(self, tape: Tape, card: Card, parts: Parts) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.parts: Counter[str] = Counter()
        self.where = ""
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._tape, self._card, self._parts = tape, card, parts
        self._sizes: dict[int, tuple[int, str]] = {}
        self._by_part: Counter[str] = Counter()
        self._making = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on fake tensors."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most of what is asked, and no operator
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        on_gpu = self._making or any(self.on_gpu(each) for each in inputs)
        if func is READ_SCALAR:
            return self._number(func, inputs[0], on_gpu)
        result = func(*args, **kwargs)
        if on_gpu:
            outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
            new = [self._place(each) for each in outputs]
            self._tape.compute(self._parts.innermost, self._seconds(func, inputs, outputs, any(new)))
        return result

    def _number(self, func: Any, tensor: Tensor, on_gpu: bool) -> Any:
        """The number of a tensor: what the host knows of its own tensors, else 1."""
        if on_gpu:
            self.host_waits("item()")
        else:
            with suppress(DataDependentOutputException):
                return func(tensor)
        return 1.0 if tensor.dtype.is_floating_point else 1

    def on_gpu(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        return storage_key(tensor.untyped_storage()) in self._sizes

    def onto_gpu(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host on the GPU."""
        faked = self.fake.from_tensor(tensor) if not isinstance(tensor, FakeTensor) else tensor
        self._place(faked)
        return faked

    def off_gpu(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor on the host."""
        with self.fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Inside, what is made is made on the GPU."""
        before, self._making = self._making, True
        try:
            yield
        finally:
            self._making = before

    def host_waits(self, what: str) -> None:
        """Note that the host waits for the GPU."""
        self._tape.events.append(HostWait(what, line()))

    def launched(self, tensors: list[Tensor]) -> None:
        """Note a kernel that reads or writes some tensors."""
        moved = sum(each.numel() * each.element_size() for each in tensors)
        self._tape.compute(self._parts.innermost, moving(self._card, moved))

    def multiplied(self, rows: int, inner: int, columns: int) -> None:
        """Note a product [rows, inner] x [inner, columns] in FP8."""
        self._tape.compute(self._parts.innermost, product(self._card, rows, inner, columns, fp8=True))

    def start_peak(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.parts, self.where = self.now, self._by_part.copy(), ""

    def watch(self) -> Callable[[], tuple[Rise, Counter[str]]]:
        """Begin to watch; what is returned ends it, and says how memory rose, and by how much each part has more."""
        outer = self.peak, self.parts, self.where
        now, by_part = self.now, self._by_part.copy()
        self.start_peak()

        def end() -> tuple[Rise, Counter[str]]:
            rise = Rise(self.peak - now, _less(self.parts, by_part), self.where)
            if outer[0] >= self.peak:
                self.peak, self.parts, self.where = outer
            return rise, _less(self._by_part, by_part)

        return end

    def rise(self, rise: Rise) -> None:
        """Note that memory rises, and falls again, as it did before."""
        if self.now + rise.size > self.peak:
            self.peak, self.where = self.now + rise.size, rise.where
            self.parts = self._by_part.copy()
            self.parts.update(rise.parts)

    def hold(self, parts: Counter[str]) -> list[Tensor]:
        """Allocate the bytes of each part of the step on the GPU, and return what holds them."""
        held = []
        for name, size in parts.items():
            if size > 0:
                with self._parts.part(name):
                    held.append(self.new((size,), torch.uint8))
        return held

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a new tensor on the GPU."""
        with self.making():
            return torch.empty(tuple(shape), dtype=dtype)

    def of(self, tensor: Tensor) -> Counter[str]:
        """The bytes of a tensor, by part of the step, if it is on the GPU."""
        size, part = self._sizes.get(storage_key(tensor.untyped_storage()), (0, ""))
        return Counter({part: size} if part else {})

    def _place(self, tensor: Tensor) -> bool:
        """Count a tensor's storage as one of the GPU, if it is not counted yet."""
        storage = tensor.untyped_storage()
        if storage_key(storage) in self._sizes:
            return False
        self._allocate(storage)
        weakref.finalize(storage, self._free, storage_key(storage))
        return True

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew whose size has changed."""
        if storage_key(storage) in self._sizes:
            self._free(storage_key(storage))
            self._allocate(storage)

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        size, part = storage.nbytes(), self._parts.innermost
        self._sizes[storage_key(storage)] = size, part
        self.now += size
        self._by_part[part] += size
        if self.now > self.peak:
            self.start_peak()
            self.where = line()

    def _free(self, key: int) -> None:
        size, part = self._sizes.pop(key)
        self.now -= size
        self._by_part[part] -= size

    def _seconds(self, func: Any, inputs: list[Tensor], outputs: list[Tensor], made: bool) -> float:
        name = func.overloadpacket
        if name in (aten.mm, aten.addmm):
            left, right = inputs[-2:]
            return product(self._card, left.shape[0], left.shape[1], right.shape[1], fp8=False)
        if name in (aten.bmm, aten.baddbmm):
            left, right = inputs[-2:]
            return left.shape[0] * product(self._card, left.shape[1], left.shape[2], right.shape[2], fp8=False)
        if any(word in name.__name__ for word in _ATTENTION):
            return self._attention(inputs, backward="backward" in name.__name__)
        if name in _FREE or not (made or mutates(func)):
            return 0.0
        return moving(self._card, sum(each.numel() * each.element_size() for each in (*inputs, *outputs)))

    def _attention(self, inputs: list[Tensor], backward: bool) -> float:
        query, key = inputs[1:3] if backward else inputs[:2]
        operations = 4 * query.numel() * key.shape[-2] * (2.5 if backward else 1)
        return operations / self._card.attention(key.shape[-2])


def _less(one: Counter[str], other: Counter[str]) -> Counter[str]:
    """The difference, where it is none too."""
    difference = one.copy()
    difference.subtract(other)
    return difference
