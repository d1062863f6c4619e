"""Other people's weight files, mapped into memory: nothing is read before a tensor's values are used.

PyTorch files (`.pt`, `.pth`, `.bin`), safetensors, TorchScript archives (OpenAI's CLIPs), and folders that hold one of
these or an index of several.
"""

import argparse
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from w2s.checkpoint.weights.torchscript import read_torchscript
from w2s.compat import NOT_A_TORCH_FILE
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint.safe_unpickling import check_records, refused_name

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".pth.tar")
"""Endings of weight files; the last one is what timm's training writes, a file of torch."""
WRAPPERS = ("state_dict_ema", "model_ema", "model", "module", "state_dict")
"""Keys below which training programs put the weights; their average over the steps first, as timm takes them."""
FILES = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
"""Names of the weights in a folder, without their ending, as open_clip, timm and transformers write them."""


class Tensors(Protocol):
    """The tensors of a checkpoint by name."""

    @property
    def meta(self) -> Mapping[str, Tensor]:
        """Every tensor on the meta device, for its shape and type."""

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, which nobody may change."""


class InMemory:
    """Tensors that are there already, or are mapped to a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.meta = {name: tensor.to("meta") for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.tensors[name]


def open_weights(path: Path) -> Tensors:
    """Return the tensors of a file, an index (`….index.json`) or a folder, under the names that they have there.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds no tensors.
    """
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist (from {Path.cwd()}): give the path of a weights file")
    if path.name.endswith(".index.json"):
        return _open_all(_indexed(path), path)
    if not path.name.endswith(SUFFIXES):
        raise CheckpointError(f"{path} is not a weights file: give one that ends in {', '.join(SUFFIXES)}, or an index")
    return _open_all([path], path)


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds weight files or an index of them."""
    return folder.is_dir() and any(_is_weights(path) for path in folder.iterdir())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what loaders raise over a damaged file into one line.

    Raises:
        CheckpointError: the code inside could not read `path`.
    """
    try:
        yield
    except (RuntimeError, ValueError, EOFError, OSError, LookupError, pickle.UnpicklingError, SafetensorError) as error:
        if NOT_A_TORCH_FILE in str(error) and not _is_pickle(path):
            reason = "it is not a file of weights, or cut short"
        elif NOT_A_TORCH_FILE in str(error):
            reason = "it has PyTorch's old format, which cannot be mapped: load it and torch.save it again"
        elif "weights_only" in str(error):
            name = refused_name(error) or "more than tensors"
            reason = f"it holds {name}, which may run code: save its state_dict alone"
        else:
            reason = f"damaged, or cut short? {' '.join(str(error).split())[:160]}"
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


def weights_in(folder: Path) -> Path:
    """The weights file of a folder, or its index: a known name, or the only one.

    Raises:
        CheckpointError: there is none, or several of unknown names.
    """
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt")
    known = [folder / f"{name}{ending}" for name in FILES for ending in endings]
    files = [path for path in known if path.is_file()] or [
        path for path in sorted(folder.iterdir()) if _is_weights(path)
    ]
    if not files or (files[0] not in known and len(files) > 1):
        names = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(f"{folder} holds no weights file that is known by its name ({names}): give the file")
    return files[0]


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _is_weights(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) or path.name.endswith(".index.json")


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = sorted({index.parent / name for name in names.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of weights: it has no weight_map") from error
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist, but {index.name} names it: fetch the missing part")
    return paths


def _open_all(paths: list[Path], name: Path) -> Tensors:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with reading(path):
            tensors |= _mapped(path)
    if not tensors:
        raise CheckpointError(f"{name} holds no tensors: give a file of weights")
    return InMemory(tensors)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each a part of its mapping into memory."""
    if path.suffix != ".safetensors":
        return _tensors_of(_load(path))
    with safe_open(path, "pt") as file:
        names: list[str] = file.keys()
        return {name: file.get_tensor(name) for name in names}


def _load(path: Path) -> Any:
    check_records(path)
    try:
        # timm saves the arguments of its command beside the weights: plain values in an object without code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
    return read_torchscript(path)


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """The weights in what a training program saved: below its wrappers, without what is not a tensor."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
