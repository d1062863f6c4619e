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
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from w2s.megatron.unpickling import COMMON, check_common, read_metadata
from w2s.megatron.writing import reporting


class StoredTensors:
    """The weights of a distributed checkpoint by name, whatever layout wrote them; optimizer states are left out.

    Attributes:
        meta: every weight as a tensor on the meta device.
    """

    def __init__(self, folder: Path) -> None:
        """Read the names and shapes.

        Raises:
            CheckpointError: the folder's metadata is damaged, or a file of it would run code.
        """
        self.folder = folder
        check_common(folder)  # not needed here, but a checkpoint is refused by all or by none
        self.meta = {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
            for name, tensor in read_metadata(folder).state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata) and not name.startswith("optimizer.")
        }

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU.

        Raises:
            CheckpointError: the files are damaged.
        """
        tensor = torch.empty_like(self.meta[name], device="cpu")
        with _alone(), reporting(f"read {self.folder}", "use another checkpoint"):
            dcp.load({name: tensor}, checkpoint_id=str(self.folder), no_dist=True)
        return tensor


def write_tensors(folder: Path, meta: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write weights that `w2s.megatron.state` can load at any layout into an existing folder.

    Args:
        folder: where to.
        meta: every weight as a tensor on the meta device, by name.
        read: returns a weight; called once for each, one after another, and nothing is kept.

    Raises:
        CheckpointError: the files cannot be written.
    """
    writer = FileSystemWriter(str(folder))
    with _alone(), reporting(f"write {folder}", "free some space or choose another folder"):
        dcp.save(dict(meta), storage_writer=writer, planner=_OneAtATime(read), no_dist=True)
    torch.save({}, folder / COMMON)  # Megatron looks for it; nothing of ours is in it
    save_config(CheckpointingConfig("torch_dist"), str(folder))


@contextmanager
def _alone() -> Iterator[None]:
    """Keep torch from warning at every call that this is one process, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class _OneAtATime(DefaultSavePlanner):
    """Gives the writer each tensor when it gets to it."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._read(write_item.index.fqn)
