"""Processes that write checkpoints and die."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from tests.megatron.spawn import run_split
from w2s.errors import W2SError
from w2s.megatron import compat
from w2s.megatron.checkpoint.async_save import AsyncSave
from w2s.megatron.parallel.process_groups import Ranks


def _report() -> None:
    filesystem_async._results_queue.put("written")


def _kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save(ranks: Ranks, folder: Path) -> tuple[str, int]:
    """What rank 0 and rank 1, whose writer is killed, are told."""

    def begin(*_: Any) -> AsyncRequest:
        return AsyncRequest(_report if ranks.main else _kill_itself, (), [lambda: pytest.fail("nothing is finished")])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "begin_save", begin)
        writing = AsyncSave(folder, {}, background=True)
        with pytest.raises(W2SError) as caught:
            writing.finish()
    return str(caught.value), caught.value.exit_code


def test_every_rank_learns_that_a_writer_was_killed(tmp_path: Path) -> None:
    (told, code), other = run_split(_save, 2, tmp_path)
    assert (told, code) == other
    assert told.startswith(f"the process that wrote {tmp_path} on rank 1 was killed by SIGKILL: see the system's log")
    assert code == 1
