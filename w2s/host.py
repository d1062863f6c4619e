"""The process and the machine that it runs on."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU free, instead of handing it back to the system.

    By default every block above 32 MiB, and often smaller ones, comes fresh from the system each time, page by page: a
    third to two thirds of a small model's step on a CPU. Elsewhere than with glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
