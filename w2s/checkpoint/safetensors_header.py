"""What a safetensors file begins with, for those who write its tensors one at a time: the library wants them all."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from w2s.errors import CheckpointError

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_header(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """Return eight bytes with the header's length and the header in JSON; the values follow in the order of `tensors`.

    Args:
        tensors: every tensor by name; they may be on the meta device.
        about: the file's own metadata.

    Raises:
        CheckpointError: safetensors has no such type of numbers.
    """
    header: dict[str, object] = {"__metadata__": about}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise CheckpointError(f"{name} is of type {tensor.dtype}, which no weights have: export another checkpoint")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values start at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text
