"""Run a function on several local ranks over gloo."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=120)
"""A rank that waits longer for another one fails."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` in `world_size` new processes that share a default process group.

    When a rank fails, the others are stopped and the error carries its traceback.

    Args:
        fn: a function at the top level of a module, so that the new processes can import it.
        world_size: number of ranks.
        args: arguments that can be pickled.

    Returns:
        What `fn` returned on every rank, by rank (anything that `torch.save` takes).

    Raises:
        torch.multiprocessing.ProcessRaisedException: `fn` raised on a rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(world_size, folder, fn, args), nprocs=world_size)
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        torch.save(fn(*args), _result(folder, rank))
    finally:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder, f"result-{rank}.pt")
