import os
import subprocess
import sys

import pytest
import torch

from tests.distributed import run_ranks
from w2s.host import compute_deterministically, prepare_cuda

PRINTING = """
import logging, sys
from rich.console import Console
from w2s.host import keep_printing

{keep}()
print("x" * 100_000, flush=True)
Console().print("[b]a line[/b]")
logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({{"msg": "note"}}))
print("left in the buffer", end="")
"""


@pytest.mark.parametrize(("keep", "code"), [("keep_printing", 0), ("list", 1)])
def test_a_terminal_on_a_full_disk(keep: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PRINTING.format(keep=keep)], stdout=full, stderr=full)
    assert done.returncode == code


def test_what_can_be_printed_is_printed() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTING.format(keep="keep_printing")], capture_output=True, text=True)
    assert done.stdout == "x" * 100_000 + "\na line\nnote\nleft in the buffer"


def put_without_an_order() -> str:
    """In a process of its own: an operator that has no deterministic algorithm."""
    compute_deterministically()
    try:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    except RuntimeError as error:
        return str(error)
    return "done"


def test_what_has_no_deterministic_algorithm_is_refused_where_it_is_asked_for() -> None:
    assert "does not have a deterministic implementation" in run_ranks(put_without_an_order, 1)[0]


def test_cuda_is_told_before_it_starts_and_users_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")
    for name in (*names, "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    told = []
    for tensor, deterministic in ((1, False), (2, False), (2, True)):
        prepare_cuda(tensor, deterministic)
        told.append([os.environ.get(name) for name in names])
    memory = "expandable_segments:True"
    assert told == [
        [None, "Tree", memory, None],
        ["1", "Tree", memory, None],
        ["1", "Tree", memory, ":4096:8"],
    ]
