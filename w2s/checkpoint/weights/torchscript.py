"""The tensors of a TorchScript archive, without its program: `torch.jit.load` would run parts of it."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2s.compat import SCRIPTED_LISTS, TENSOR_FUNCTIONS, TorchFileReader, storage_types, typed_storage
from w2s.megatron.checkpoint.safe_unpickling import Unpickler, reading

_TYPES = storage_types()
"""Types of numbers by torch's names of their storages."""


class _Object:
    """Stands for an object of any of the program's classes; its attributes are in its `__dict__`."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):  # what else there may be, only the program could take apart
            self.__dict__.update(state)


class _Archive(Unpickler):
    """Reads `data.pkl`, mapping the tensors' values to the file.

    Args:
        path: the archive.
    """

    def __init__(self, path: Path) -> None:
        self._records = TorchFileReader(str(path))
        with zipfile.ZipFile(path) as archive:  # the reader tells no sizes before torch 2.13
            self._sizes = {each.filename.partition("/")[2]: each.file_size for each in archive.infolist()}
        self._bytes = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        super().__init__(self._records.get_record("data.pkl"), str(path))

    def allowed_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Object
        if f"{module}.{name}" in TENSOR_FUNCTIONS:
            return TENSOR_FUNCTIONS[f"{module}.{name}"]
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if module == SCRIPTED_LISTS:
            return lambda values, *_: values  # lists of one type
        return super().allowed_class(module, name)

    def persistent_load(self, pid: tuple[str, torch.dtype, str, str, int]) -> torch.TypedStorage:
        """Return a storage that is mapped to the file."""
        _, dtype, key, _, numel = pid
        start = self._records.get_record_offset(f"data/{key}")
        size = numel * dtype.itemsize
        if not 0 <= size <= self._sizes[f"data/{key}"]:
            raise pickle.UnpicklingError(f"data/{key} has not {numel} values")
        return typed_storage(self._bytes[start : start + size], dtype)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return parameters, buffers and other tensors of the archived module by name.

    Raises:
        CheckpointError: the archive is damaged, or names what is not part of one.
    """
    with reading(str(path)):
        return dict(_tensors(_Archive(path).load(), "", set()))


def _tensors(module: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Object) or id(module) in seen:
        return
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _tensors(value, f"{prefix}{name}.", seen)
