"""Weight files written one tensor at a time, so that no more than one is in memory."""

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch

from w2s.checkpoint.safetensors_header import safetensors_header
from w2s.checkpoint.weights.tensor_files import Tensors
from w2s.compat import FakeTensorMode


def write_safetensors(path: Path, tensors: Tensors, about: Mapping[str, str]) -> None:
    """Write a safetensors file, with `about` as its own metadata."""
    with path.open("wb") as file:
        file.write(safetensors_header(tensors.meta, {"format": "pt", **about}))
        for name in tensors.meta:
            file.write(tensors.read(name).contiguous().flatten().view(torch.uint8).numpy().data)


def write_pt(path: Path, tensors: Tensors) -> None:
    """Write a state dict as `torch.save` does: first a file of the right size, then each tensor through a mapping."""
    with FakeTensorMode():
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.meta.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in mapped.items():
        tensor.copy_(tensors.read(name))
