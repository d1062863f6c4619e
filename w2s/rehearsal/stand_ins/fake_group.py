"""Process groups of one rank among many that are not there: what it would send is noted, and nothing is sent."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from w2s.bench.marks import Parts
from w2s.compat import FakeTensor, fake_store, group_name
from w2s.rehearsal.stand_ins.streams import Streams
from w2s.rehearsal.stand_ins.where import line
from w2s.rehearsal.tape import Call, Group, Tape

_BACKEND = "w2s_rehearsal"
_ProcessGroup: Any = ProcessGroup  # whose methods have several signatures each


class Recorder:
    """Writes the calls of a rank down on its tape; the last one has the number `last_number`."""

    def __init__(self, tape: Tape, parts: Parts, streams: Streams) -> None:
        self.tape, self.streams, self._parts = tape, streams, parts
        self.batch = self.last_number = -1
        self._batches = count()

    def call(self, group: int, kind: str, tensors: Sequence[Tensor], size: int, **more: Any) -> "_Posted":
        """Note a call, and return what is waited for."""
        number = self.next_number()
        words = tuple(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
        self.tape.events.append(
            Call(number, kind, group, words, size, line(), self._parts.innermost, batch=self.batch, **more)
        )
        return _Posted(self.streams, group, number)

    def next_number(self) -> int:
        """Return the number of the next call."""
        self.last_number += 1
        return self.last_number

    @contextmanager
    def together(self) -> Iterator[None]:
        """Messages inside begin together."""
        self.batch = next(self._batches)
        try:
            yield
        finally:
            self.batch = -1


class _Posted(Work):
    """A call that was begun. It is done at once; that somebody waits for it is noted."""

    def __init__(self, streams: Streams, group: int, number: int) -> None:
        super().__init__()
        self._streams, self._call = streams, {group: number}

    def wait(self, timeout: Any = None) -> bool:
        self._streams.wait(self._call)
        return True

    def is_completed(self) -> bool:
        return True


class RecordedGroup(_ProcessGroup):
    """A process group whose other ranks are not there.

    Results are what a rank would get if all others had sent what it has sent itself.
    """

    def __init__(self, recorder: Recorder, index: int, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._recorder, self._index, self._place, self._size = recorder, index, rank, size

    def getBackendName(self) -> str:
        """Return the name that torch knows this kind of group by."""
        return _BACKEND

    group_name = ""
    """Torch's."""

    def rank(self) -> int:
        """Return this rank's place in the group."""
        return self._place

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def _note(self, kind: str, tensors: Sequence[Tensor], size: int, **more: Any) -> _Posted:
        return self._recorder.call(self._index, kind, tensors, size, **more)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Note an all-reduce."""
        return self._note("all_reduce", tensors, _bytes(tensors), reduction=_reduction(opts))

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Note a broadcast."""
        return self._note("broadcast", tensors, _bytes(tensors), reduction=f"from {opts.rootRank}")

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Note a reduction onto one rank."""
        return self._note("reduce", tensors, _bytes(tensors), reduction=f"{_reduction(opts)} to {opts.rootRank}")

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Note an all-gather into several tensors."""
        for output in outputs[0]:
            _copy(output, inputs[0])
        return self._note("all_gather", inputs, self._size * _bytes(inputs))

    def all_gather_single(self, output: Tensor, local: Tensor, opts: Any = None) -> Work:
        """Note an all-gather into one tensor."""
        _copy(output.view(self._size, -1), local.reshape(1, -1))
        return self._note("all_gather", [local], _bytes([output]))

    _allgather_base = all_gather_single  # torch before 2.13

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """Note several all-gathers at once."""
        return self._note("all_gather", inputs, _bytes(outputs))

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        """Note a reduce-scatter of several tensors."""
        return self._note("reduce_scatter", outputs, self._size * _bytes(outputs), reduction=_reduction(opts))

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any = None) -> Work:
        """Note a reduce-scatter of one tensor."""
        return self._note("reduce_scatter", [output], _bytes([whole]), reduction=_reduction(opts))

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], wholes: list[Tensor], opts: Any = None) -> Work:
        """Note several reduce-scatters at once."""
        return self._note("reduce_scatter", outputs, _bytes(wholes), reduction=_reduction(opts))

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def barrier(self, opts: Any = None) -> Work:
        """Note a barrier."""
        return self._note("barrier", [], 0)

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Work:
        """Note a message to another rank."""
        return self._message("send", tensors, peer)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> Work:
        """Note a message from another rank."""
        return self._message("receive", tensors, peer)

    def _message(self, kind: str, tensors: list[Tensor], peer: int) -> Work:
        ranks = self._recorder.tape.groups[self._index].ranks
        return self._note(kind, tensors, _bytes(tensors), peer=ranks[peer])

    def objects(self, kind: str) -> None:
        """Note an exchange of Python objects, which the host waits for."""
        self._note(kind, [], 0).wait()


def _copy(output: Tensor, local: Tensor) -> None:
    """Let all ranks have sent the same; without numbers there is nothing to do, and no kernel would do it."""
    if not isinstance(output, FakeTensor):
        output.copy_(local)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reduction(opts: Any) -> str:
    if opts is None:
        return ""
    return str(getattr(opts.reduceOp, "op", opts.reduceOp)).rpartition(".")[2].lower()


@contextmanager
def joined(recorder: Recorder, rank: int, world_size: int) -> Iterator[None]:
    """Be a rank of a world whose other ranks are not there."""
    make, tape, index = dist.new_group, recorder.tape, 0

    def create(store: Any, rank: int, size: int, timeout: Any) -> RecordedGroup:
        return RecordedGroup(recorder, index, rank, size)

    tape.groups[index] = Group("world", tuple(range(world_size)), on_gpu=True)

    def new_group(ranks: Any = None, *unused: Any, backend: Any = None, group_desc: Any = None, **more: Any) -> Any:
        """Make a group, over gloo too, of ours; every rank makes all, so that all count them alike."""
        nonlocal index
        index += 1
        members = tuple(range(world_size) if ranks is None else ranks)
        if rank in members:
            name = (group_desc or "all").lower().removesuffix("_group").replace("_", " ")
            tape.groups[index] = Group(name, members, on_gpu=backend != "gloo")
        more.pop("timeout", None)
        return named(make(ranks, backend=_BACKEND, **more))

    def named(group: Any) -> Any:
        if isinstance(group, RecordedGroup):
            group.group_name = group_name(group)
        return group

    def exchange_objects(kind: str, group: Any) -> None:
        (group or world).objects(kind)

    def gather_objects(out: list[Any], value: Any, group: Any = None) -> None:
        out[:] = [value] * len(out)
        exchange_objects("gather of objects", group)

    def share_objects(values: list[Any], *unused: Any, group: Any = None, **more: Any) -> None:
        exchange_objects("broadcast of objects", group)

    def begin_messages(batch: Sequence[Any]) -> list[Work]:
        with recorder.together():
            return [each.op(each.tensor, each.peer, group=each.group) for each in batch]

    if not hasattr(dist.Backend, _BACKEND.upper()):
        dist.Backend.register_backend(_BACKEND, create, devices=["cpu"])
    with ExitStack() as undo:
        dist.init_process_group(_BACKEND, store=fake_store(), rank=rank, world_size=world_size)
        world = named(dist.group.WORLD)
        undo.callback(dist.destroy_process_group)
        stand_ins = {
            "new_group": new_group,
            "all_gather_object": gather_objects,
            "broadcast_object_list": share_objects,
            "batch_isend_irecv": begin_messages,
            "get_backend": lambda *_: "nccl",  # which can scale what it adds up
        }
        for module in (dist, dist.distributed_c10d):
            for name, stand_in in stand_ins.items():
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, stand_in)
        yield
