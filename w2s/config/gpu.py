"""The GPU of this process and the libraries for it, as far as the configuration depends on them."""

import os
from dataclasses import dataclass
from importlib.machinery import PathFinder

import torch


@dataclass(frozen=True)
class Card:
    """The GPU of this process."""

    name: str
    """As its driver calls it."""
    capability: tuple[int, int]
    """CUDA's compute capability."""

    @property
    def hopper_or_newer(self) -> bool:
        """Whether it is an NVIDIA Hopper or newer, which has FP8 tensor cores that Transformer Engine's recipes use."""
        return self.capability >= (9, 0)


def card() -> Card | None:
    """Return the GPU that this process trains on; None without one."""
    if not torch.cuda.is_available():
        return None
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return Card(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def cuda_version() -> tuple[int, ...] | None:
    """Return the CUDA that torch was built for, such as (12, 8); None for a build without it."""
    return tuple(map(int, torch.version.cuda.split("."))) if torch.version.cuda else None


def transformer_engine_installed() -> bool:
    """Whether Transformer Engine is on the import path; it is not imported."""
    return PathFinder.find_spec("transformer_engine") is not None
