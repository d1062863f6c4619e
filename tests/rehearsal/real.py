"""What real ranks call one another over gloo, written down as a rehearsal does."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Noted = tuple[str, tuple[int, ...], tuple[str, ...], int]
"""Kind of a call, ranks of its group, type and shape of what goes in, and the peer of a message or -1."""

KINDS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "_reduce_scatter_base": ("reduce_scatter", 0),
    "reduce_scatter_single": ("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 0),
    "send": ("send", 0),
    "recv": ("receive", 0),
}
"""Methods of a process group: what a rehearsal calls them, and which argument goes in."""


@contextmanager
def noted() -> Iterator[list[Noted]]:
    """Note this rank's calls, but for exchanges of Python objects."""
    calls: list[Noted] = []
    silent = [False]

    def note(name: str, kind: str, place: int) -> Callable[..., Any]:
        original = getattr(ProcessGroup, name)

        def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if not silent[0]:
                ranks = tuple(dist.get_process_group_ranks(group))
                peer = ranks[args[1]] if name in ("send", "recv") else -1
                calls.append((kind, ranks, words(args[place]), peer))
            return original(group, *args, **kwargs)

        return call

    def unnoted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            silent[0] = True
            try:
                return original(*args, **kwargs)
            finally:
                silent[0] = False

        return call

    with ExitStack() as stack:
        for name, (kind, place) in KINDS.items():
            if hasattr(ProcessGroup, name):
                stack.enter_context(mock.patch.object(ProcessGroup, name, note(name, kind, place)))
        for name in ("all_gather_object", "broadcast_object_list"):
            stack.enter_context(mock.patch.object(dist, name, unnoted(getattr(dist, name))))
        yield calls


def words(tensors: Tensor | list[Any]) -> tuple[str, ...]:
    if isinstance(tensors, Tensor):
        return (f"{str(tensors.dtype).removeprefix('torch.')}{list(tensors.shape)}",)
    return tuple(word for each in tensors for word in words(each))


def real_calls(config: Any, build: Callable[..., Any], steps: int) -> list[Noted]:
    """What this rank calls in some steps of a stage."""
    from w2s.bench.synthetic import synthetic_batch
    from w2s.megatron.parallel import process_groups
    from w2s.training.stage import train_step

    with process_groups.initialize_groups(config.parallel, torch.device("cpu")) as ranks:
        stage = build(config, ranks)
        batch = synthetic_batch(stage.spec, config.train.global_batch // ranks.world_size, config.model.text.vocab_size)
        with noted() as calls:
            for _ in range(steps):
                train_step(stage, batch, 1.0)
    return calls
