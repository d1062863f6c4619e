"""The process and the machine that it runs on."""

import ctypes
import errno
import io
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
_NOBODY_READS = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
"""Errors of a terminal that is a file on a full disk, or that is gone."""


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU free, instead of handing it back to the system.

    By default every block above 32 MiB, and often smaller ones, comes fresh from the system each time, page by page: a
    third to two thirds of a small model's step on a CPU. Elsewhere than with glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def use_huge_pages() -> None:
    """Let tensors on the CPU lie in huge pages, where the system has them for those who ask; `keep_freed_memory` first.

    A small model's step takes 3 to 5 % less time so. glibc asks for its heap only if told before the process starts. So
    the heap is stretched once over half of the machine's memory, which takes none of it, and this is asked for here.
    Where address space is counted, or elsewhere than with glibc, this does nothing.
    """
    if platform.libc_ver()[0] != "glibc" or not address_space_is_free():
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    page, size = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    begin = libc.malloc(ctypes.c_size_t(size))
    if begin:
        first = begin // page * page
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(begin + size - first), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(begin))


def address_space_is_free() -> bool:
    """Whether a process may have more address space than it uses: no limit and no strict overcommit counts it."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    try:
        overcommit = Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip()
    except OSError:
        return False
    return overcommit != "2" and all(limit == resource.RLIM_INFINITY for limit in limits)


def keep_printing() -> None:
    """Let output be lost where a full disk does not take it: what a run prints is no reason to end it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Outlasting(stream.fileno(), "w", closefd=False))
            lines = stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=lines))


class _Outlasting(io.FileIO):
    """A file that takes everything, and keeps what it can."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NOBODY_READS:
                raise
            return memoryview(data).nbytes


def prepare_cuda(tensor: int, deterministic: bool) -> None:
    """Set what CUDA and its libraries read from the environment when they start; what the user has set stays.

    Args:
        tensor: tensor-parallel size.
        deterministic: whether a step that is repeated has to give the same bits.
    """
    # Pieces of memory that grow: at 90 % of a card, sizes that vary a little would leave gaps which fit nothing.
    name = "PYTORCH_ALLOC_CONF" if TorchVersion(torch.__version__) >= "2.9" else "PYTORCH_CUDA_ALLOC_CONF"
    wanted = {name: "expandable_segments:True"}
    if tensor > 1:
        # One queue to the GPU: with more, communication begun first may come after the product that should hide it.
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic:
        wanted |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "Ring"}
    for key, value in wanted.items():
        os.environ.setdefault(key, value)


def compute_deterministically() -> None:
    """Let torch take the algorithms alone that give the same bits every time, and refuse operators that have none."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing is read unwritten
    torch.backends.cudnn.benchmark = False
