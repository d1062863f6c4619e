"""Checkpoints are read without running code from them.

Two things in torch's distributed format are pickles: the file `.metadata`, which torch reads with `pickle.load`, and
objects that are not tensors, which it reads with `torch.load(weights_only=False)`. Both run what their author wrote.
Importing this module puts readers in their place that know the classes of the format and no others; Megatron reads
through them too.
"""

import io
import pathlib
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from w2s.compat import LAYOUT_FUNCTIONS, STORAGE_FROM_BYTES, TENSOR_FUNCTIONS, PythonUnpickler
from w2s.errors import CheckpointError

METADATA = ".metadata"
"""torch's file of names, shapes and places."""
COMMON = "common.pt"
"""Megatron's file for what is not a tensor of a tower or the optimizer."""

_CLASSES = {
    metadata: ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
               "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    planner: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
}  # fmt: skip
_KNOWN: dict[str, Any] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in _CLASSES.items()
    for name in names
    if hasattr(module, name)
} | {
    **LAYOUT_FUNCTIONS,
    "torch.Size": torch.Size,
    "collections.OrderedDict": dict,
    "pathlib.PosixPath": pathlib.PosixPath,
    "pathlib._local.PosixPath": pathlib.PosixPath,  # Python 3.13
}
"""What `.metadata` may name, and what stands for it."""


_LARGEST_COMPRESSED = 2**26
"""Bytes of a record that is compressed in an archive, as the program in one of TorchScript is."""
_STORAGES = (STORAGE_FROM_BYTES, "megatron.core.safe_globals.safe_load_from_bytes")
"""What a pickled tensor names for its values: torch's function, or what Megatron-Core 0.19 puts in its place."""


class Unpickler(PythonUnpickler):
    """Knows the classes of the distributed format, and no others.

    Python's own unpickler, as that in C makes room for as many objects as a pickle of some bytes may ask for.

    Args:
        data: a pickle.
        place: where it is from, for messages.
    """

    def __init__(self, data: bytes, place: str) -> None:
        super().__init__(io.BytesIO(data))
        self._place = place

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names.

        Raises:
            CheckpointError: it is none of the format's classes.
        """
        allowed = self.allowed_class(module, name)
        if allowed is None:
            raise forbidden_class_error(self._place, f"{module}.{name}")
        return allowed

    def allowed_class(self, module: str, name: str) -> Any:
        """Return a class of the format, None for any other."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _KNOWN.get(f"{module}.{name}")


class _StateUnpickler(Unpickler):
    """Knows what Transformer Engine pickles as the state of a linear: tensors, and its recipes."""

    def allowed_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _STORAGES:
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if f"{module}.{name}" in TENSOR_FUNCTIONS:
            return TENSOR_FUNCTIONS[f"{module}.{name}"]
        if module == "transformer_engine.common.recipe":
            recipe = getattr(sys.modules.get(module), name, None)
            return recipe if isinstance(recipe, type) and recipe.__module__ == module else None
        return super().allowed_class(module, name)


def forbidden_class_error(place: str, name: str) -> CheckpointError:
    """The error for a file that names what is not part of a checkpoint."""
    return CheckpointError(
        f"{place} names {name}, which is not part of a checkpoint and may run code: nothing was loaded, "
        "ask who made it, or use another checkpoint"
    )


def refused_name(error: Exception) -> str:
    """What `torch.load(weights_only=True)` would not load, by its message; empty where it failed for another reason."""
    match = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    return match[1] if match else ""


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turn what unpickling raises into one line.

    Raises:
        CheckpointError: what `place` names is damaged, or names what is not part of a checkpoint.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle makes Python stumble in many ways
        name = refused_name(error)
        if name:
            raise forbidden_class_error(place, name) from error
        reason = " ".join(f"{type(error).__name__} {error}".split())[:160]
        raise CheckpointError(f"{place} cannot be read ({reason}): use another checkpoint") from error


def read_metadata(folder: Path) -> Metadata:
    """Read the names, shapes and places of a checkpoint's tensors.

    Raises:
        CheckpointError: the file is missing, damaged, or names what is not part of a checkpoint.
    """
    path = folder / METADATA
    with reading(str(path)):
        metadata = Unpickler(path.read_bytes(), str(path)).load()
        if not _is_sound(metadata):
            raise ValueError("it is not a description of tensors")
    return metadata


def check_common(folder: Path) -> None:
    """Refuse a checkpoint whose common.pt holds more than tensors and plain values; Megatron loads it.

    Raises:
        CheckpointError: it does, or is damaged.
    """
    path = folder / COMMON
    if path.is_file():
        check_records(path)
        with reading(str(path)):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_records(path: Path) -> None:
    """Refuse an archive of torch whose objects are many times larger than its file: torch compresses none.

    Raises:
        CheckpointError: a record of pickled objects is compressed, and large.
    """
    if not zipfile.is_zipfile(path):
        return
    with reading(str(path)), zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED and record.file_size > _LARGEST_COMPRESSED:
                size = record.file_size / 2**20
                raise CheckpointError(f"{path}: {record.filename} is compressed, and {size:.0f} MiB: use another file")


def check_state(state: object, place: str) -> None:
    """Refuse the state of a linear that names more than tensors and FP8 recipes; Transformer Engine unpickles it.

    Args:
        state: bytes in a uint8 tensor; anything else is not unpickled.
        place: where it is from, for messages.

    Raises:
        CheckpointError: it does, or is damaged.
    """
    if isinstance(state, io.BytesIO):
        raise forbidden_class_error(place, "a file of its own")
    if isinstance(state, Tensor) and state.numel():
        with reading(place):
            _StateUnpickler(state.detach().cpu().numpy().tobytes(), place).load()


def _is_sound(metadata: object) -> bool:
    """Whether every tensor has a shape and a type, and lies in a file of the folder itself."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        return False
    return all(
        isinstance(name, str) and _is_entry(entry) for name, entry in metadata.state_dict_metadata.items()
    ) and all(
        info.relative_path == Path(info.relative_path).name and not info.transform_descriptors
        for info in metadata.storage_data.values()
    )


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    return isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)


def _read_metadata(self: FileSystemReader, *args: Any, **kwargs: Any) -> Metadata:
    """Do what torch's method of this name does, without running code."""
    metadata = read_metadata(Path(self.path))
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """Do what torch's method of this name does, after a look at what its `torch.load(weights_only=False)` would run."""
    with reading(f"{read_item.dest_index.fqn} of the checkpoint"):
        torch.load(value, map_location="cpu", weights_only=True)
    value.seek(0)
    _load_any_bytes(self, read_item, value)


_load_any_bytes = DefaultLoadPlanner.load_bytes
DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]
FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
