"""Weight files written one tensor at a time, so that no more than one is in memory."""

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from w2s.compat import FakeTensorMode
from w2s.errors import CheckpointError

Read = Callable[[str], Tensor]
"""Returns a tensor by its name."""

SAFETENSORS_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(path: Path, meta: Mapping[str, Tensor], read: Read, about: Mapping[str, str]) -> None:
    """Write a safetensors file: eight bytes with the header's length, the header in JSON, the values.

    Args:
        path: the file.
        meta: every tensor on the meta device by name.
        read: returns a tensor; called once for each.
        about: the file's own metadata.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
    end = 0
    for name, tensor in meta.items():
        if tensor.dtype not in SAFETENSORS_TYPES:
            raise CheckpointError(f"{name} is of type {tensor.dtype}, which no weights have: export another checkpoint")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in meta:
            file.write(read(name).contiguous().flatten().view(torch.uint8).numpy().data)


def write_pt(path: Path, meta: Mapping[str, Tensor], read: Read) -> None:
    """Write a state dict as `torch.save` does: first a file of the right size, then each tensor through a mapping.

    Args:
        path: the file.
        meta: every tensor on the meta device by name.
        read: returns a tensor; called once for each.
    """
    with FakeTensorMode():
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in meta.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, mmap=True, weights_only=True)
    for name, tensor in mapped.items():
        tensor.copy_(read(name))
