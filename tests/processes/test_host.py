import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from tests.distributed import run_ranks
from w2s.processes.host import address_space_is_free, compute_deterministically, prepare_cuda

PRINTING = """
import logging, sys
from rich.console import Console
from w2s.processes.host import keep_printing

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


MEMORY = """
import torch
from w2s.processes.host import keep_freed_memory, use_huge_pages

keep_freed_memory()
use_huge_pages()
tensor = torch.ones(2**24)
place, here = tensor.data_ptr(), False
for line in open("/proc/self/smaps"):
    begin, dash, end = line.split()[0].partition("-")
    if dash:
        here = int(begin, 16) <= place < int(end, 16)
    elif here and line.startswith("VmFlags"):
        print("hg" in line.split())
del tensor
highest, held = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("VmHWM", "VmRSS"))]
print(highest - held < 2**15)  # of 64 MiB, in KiB
"""


@pytest.mark.skipif(
    not (
        platform.libc_ver()[0] == "glibc"
        and address_space_is_free()
        and Path("/sys/kernel/mm/transparent_hugepage").exists()
    ),
    reason="no huge pages are asked for here",
)
def test_tensors_lie_in_huge_pages_and_their_memory_stays() -> None:
    """Both by what the system says: that huge pages are asked for where a tensor lies, and that it got nothing back."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


LIMITED = """
import resource
from w2s.processes.host import keep_freed_memory, use_huge_pages

def size():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))

resource.setrlimit(resource.{limit}, (2**45, resource.RLIM_INFINITY))
before = size()
keep_freed_memory()
use_huge_pages()
print(size() - before < 2**15)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the size of a process is read from Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_address_space_that_is_limited_is_left_alone(limit: str) -> None:
    """Half of the machine's memory would be missing to everything else; in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=limit)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]


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
    allocator = "PYTORCH_ALLOC_CONF" if TorchVersion(torch.__version__) >= "2.9" else "PYTORCH_CUDA_ALLOC_CONF"
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", allocator, "CUBLAS_WORKSPACE_CONFIG")
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
