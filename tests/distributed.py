"""Run a function on several local ranks over gloo."""

import gc
import multiprocessing
import signal
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks

# Ranks are forked from a process that has imported what takes seconds.
multiprocessing.set_forkserver_preload(
    [
        "w2s.data.stream.workers",
        "w2s.stages.mim",
        "w2s.stages.clip",
        "w2s.rehearsal.rank",
        "timm",
        "open_clip",
        "torch._dynamo",
    ]
)

TIMEOUT = timedelta(seconds=120)
"""A rank that waits longer for another one fails."""


class RankError(RuntimeError):
    """A rank failed; the message is the traceback of the first one that did."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `fn(*args)` in `world_size` new processes that share a default process group.

    Args:
        fn: a function at the top level of a module, so that the new processes can import it.
        world_size: number of ranks.
        args: arguments that can be pickled.

    Returns:
        What `fn` returned on every rank, by rank (anything that `torch.save` takes).

    Raises:
        RankError: `fn` raised, or a process died; the other ranks have been stopped.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            mp.start_processes(_rank, (world_size, folder, fn, args), world_size, start_method="forkserver")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            first = folder / "error"
            raise RankError(first.read_text() if first.exists() else str(error)) from None
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    gc.freeze()
    torch.set_num_threads(1)
    # The server may have been started where signals were blocked: a rank must end when it is told to.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        torch.save(fn(*args), folder / f"result-{rank}")
    except Exception:
        # Written before the connection closes: ranks that fail because of that come later and find the file.
        with suppress(FileExistsError), (folder / "error").open("x") as file:
            file.write(f"rank {rank} of {world_size}\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def means(ranks: Ranks, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Average what a step reports over the ranks, as a log line does."""
    return process_groups.means(ranks.gather(ranks.to_floats(values)))
