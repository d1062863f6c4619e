"""Single tensors of a distributed checkpoint, read and written one at a time by one process, without any group."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from w2s.config.sections import Weights
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint.async_save import translated_errors
from w2s.megatron.checkpoint.safe_unpickling import COMMON, check_common, read_metadata

AVERAGE = "optimizer.state.ema."
"""How the names of the moving averages begin, before those of their weights."""


class TensorStore:
    """The weights of a distributed checkpoint by name, whatever layout wrote them; optimizer states are left out.

    Attributes:
        meta: every weight as a tensor on the meta device.
        keys: the name that each has in the checkpoint.
    """

    def __init__(self, folder: Path, weights: Weights = "last") -> None:
        """Read the names and shapes.

        Args:
            folder: the checkpoint.
            weights: `ema` takes, of what was trained, the moving average, in float32.

        Raises:
            CheckpointError: the folder's metadata is damaged, a file of it would run code, or it has no average.
        """
        self.folder = folder
        check_common(folder)  # not needed here, but a checkpoint is refused by all or by none
        self._metadata = read_metadata(folder)
        entries = self._metadata.state_dict_metadata
        tensors = {name: tensor for name, tensor in entries.items() if isinstance(tensor, TensorStorageMetadata)}
        names = [name for name in tensors if not name.startswith("optimizer.")]
        averaged = {name for name in names if f"{AVERAGE}{name}" in tensors} if weights == "ema" else set()
        if weights == "ema" and not averaged:
            raise CheckpointError(
                f"{folder} holds no moving average of the weights: train with optim.ema, or take the `last` ones"
            )
        self.keys = {name: f"{AVERAGE}{name}" if name in averaged else name for name in names}
        self.meta = {
            name: torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype, device="meta")
            for name, key in self.keys.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU.

        Raises:
            CheckpointError: the files are damaged.
        """
        tensor, reader = torch.empty_like(self.meta[name], device="cpu"), _Reader(self.folder, self._metadata)
        with _single_process(), translated_errors(f"read {self.folder}", "use another checkpoint"):
            dcp.load({self.keys[name]: tensor}, storage_reader=reader, no_dist=True)
        return tensor


class _Reader(FileSystemReader):
    """Reads tensors of a folder whose metadata is known: parsing it takes longer than reading most tensors."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def has_average(folder: Path) -> bool:
    """Whether a checkpoint holds a moving average of the weights.

    Raises:
        CheckpointError: the folder's metadata is damaged.
    """
    return any(name.startswith(AVERAGE) for name in read_metadata(folder).state_dict_metadata)


def write_tensors(folder: Path, meta: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write weights that `w2s.megatron.checkpoint.state` can load at any layout into an existing folder.

    Args:
        folder: where to.
        meta: every weight as a tensor on the meta device, by name.
        read: returns a weight; called once for each, one after another, and nothing is kept.

    Raises:
        CheckpointError: the files cannot be written.
    """
    writer = FileSystemWriter(str(folder))
    with _single_process(), translated_errors(f"write {folder}", "free some space or choose another folder"):
        dcp.save(dict(meta), storage_writer=writer, planner=_StreamingPlanner(read), no_dist=True)
    torch.save({}, folder / COMMON)  # Megatron looks for it; nothing of ours is in it
    save_config(CheckpointingConfig("torch_dist"), str(folder))


@contextmanager
def _single_process() -> Iterator[None]:
    """Keep torch from warning at every call that this is one process, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class _StreamingPlanner(DefaultSavePlanner):
    """Gives the writer each tensor when it gets to it."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._read(write_item.index.fqn)
