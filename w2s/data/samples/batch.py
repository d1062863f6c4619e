"""A batch of training samples."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_VIEWS = "teacher_images"


@dataclass(kw_only=True)
class Batch:
    """Samples of a step, in the order of their global index. A field that the stage did not ask for is None."""

    images: torch.Tensor
    """The student's view: uint8 [n, 3, size, size], or [n, frames, 3, size, size] of clips."""
    teacher_images: tuple[torch.Tensor, ...] = ()
    """The same crops at each size that teachers see: uint8 [n, 3, teacher size, teacher size], of clips with frames."""
    masks: torch.Tensor | None = None
    """True where a patch is masked: bool [n, patches]."""
    kept: torch.Tensor | None = None
    """Patches that patch dropout keeps, ascending: int64 [n, kept], or [n, frames, kept] of clips."""
    branch_scales: torch.Tensor | None = None
    """What drop path multiplies the branches of the vision tower with: float32 [n, layers, 2], attention and MLP.

    Of clips [n, frames, layers, 2].
    """
    tokens: torch.Tensor | None = None
    """Tokenized captions: int64 [n, context length]."""
    caption_hashes: torch.Tensor | None = None
    """A hash of each caption's text, so that equal captions can be found: int64 [n], not negative."""
    targets: torch.Tensor | None = None
    """The teachers' features at the patches to predict: [n, k, widths]; 0 where a sample lacks a teacher."""
    teacher_summaries: torch.Tensor | None = None
    """The teachers' summaries of each image: [n, widths]; 0 where a sample lacks a teacher."""
    teacher_text_summaries: torch.Tensor | None = None
    """The teacher's embedding of each caption: [n, summary width]."""
    teacher_weights: torch.Tensor | None = None
    """What a sample counts in the loss of each teacher, 0 where it lacks the teacher: float32 [n, teachers].

    The mean over the global batch is 1. None where every sample has every teacher.
    """
    keys: list[str]
    """The samples' names in their shards; empty in a batch that was gathered from several ranks."""
    indices: torch.Tensor
    """Global sample indices: int64 [n]."""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def frames(self) -> int:
        """Frames of a sample; an image is one."""
        return 1 if self.images.ndim == 4 else self.images.shape[1]

    @property
    def first_index(self) -> int:
        """Global index of the first sample; of a batch on the host."""
        indices: list[int] = self.indices.tolist()
        return indices[0]

    def split(self, size: int) -> "list[Batch]":
        """Cut into micro-batches of `size` samples, which share memory with this batch; the last may be smaller."""
        return [self._select(slice(start, start + size)) for start in range(0, len(self), size)]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device; from pinned memory the copy continues while the host does something else."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), self.keys)

    def pinned(self) -> "Batch":
        """Copy the tensors to pinned memory."""
        return self._map(lambda tensor: tensor.pin_memory(), self.keys)

    def _select(self, selected: slice | torch.Tensor) -> "Batch":
        chosen = range(len(self))[selected] if isinstance(selected, slice) else selected.tolist()
        return self._map(lambda tensor: tensor[selected], [self.keys[index] for index in chosen if self.keys])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor], keys: list[str]) -> "Batch":
        return _batch({name: None if part is None else change(part) for name, part in _tensors(self).items()}, keys)


def require(tensor: torch.Tensor | None) -> torch.Tensor:
    """Return a field that the stage asked for.

    Raises:
        ValueError: it did not ask.
    """
    if tensor is None:
        raise ValueError("the batch lacks a field: ask for it in the SampleSpec")
    return tensor


def merge_batches(parts: Sequence[Batch]) -> Batch:
    """Join parts of one batch (all with the same fields) and order the samples by their global index."""
    if len(parts) == 1:
        return parts[0]
    fields = [_tensors(part) for part in parts]
    merged = {
        name: None if first is None else torch.cat([part[name] for part in fields]) for name, first in fields[0].items()
    }
    batch = _batch(merged, [key for part in parts for key in part.keys])
    order = batch.indices.numpy().argsort()
    return batch if np.array_equal(order, np.arange(len(batch))) else batch._select(torch.from_numpy(order))


def gather_batch(local: Batch, group: dist.ProcessGroup) -> Batch:
    """Join the equally large parts of a batch that the ranks of `group` hold, by one collective.

    Returns:
        All samples, in the order of their global index, on every rank.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return local
    packed_bytes = _packed(local)
    gathered = packed_bytes.new_empty(size * len(local), packed_bytes.shape[1])
    dist.all_gather_into_tensor(gathered, packed_bytes, group=group)
    joined = _unpacked(gathered, local)
    order = joined.indices.argsort()
    return joined._map(lambda tensor: tensor[order], [])


def swap_batch(local: Batch, group: dist.ProcessGroup, *, to: int, source: int) -> Batch:
    """Give a batch on the host to one rank and return that of another, which has the same fields and size.

    Args:
        local: what is given.
        group: over gloo, with both.
        to: rank in the world.
        source: rank in the world.
    """
    packed_bytes = _packed(local)
    other = torch.empty_like(packed_bytes)
    works = [dist.isend(packed_bytes, to, group=group), dist.irecv(other, source, group=group)]
    for work in filter(None, works):
        work.wait()
    return _unpacked(other, local)


def _packed(batch: Batch) -> torch.Tensor:
    """A batch's tensors side by side, as bytes: uint8 [n, bytes of a sample]."""
    tensors = [tensor for tensor in _tensors(batch).values() if tensor is not None]
    return torch.cat([tensor.reshape(len(batch), -1).contiguous().view(torch.uint8) for tensor in tensors], dim=1)


def _unpacked(packed_bytes: torch.Tensor, like: Batch) -> Batch:
    """Undo `_packed`, for a batch with the fields of another, which may have more or fewer samples."""
    fields = {name: tensor for name, tensor in _tensors(like).items() if tensor is not None}
    sizes = [tensor[0].numel() * tensor.element_size() for tensor in fields.values()]
    parts = {
        name: part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
        for (name, tensor), part in zip(fields.items(), packed_bytes.split(sizes, dim=1), strict=True)
    }
    return _batch(parts, [])


def _tensors(batch: Batch) -> dict[str, Any]:
    """All tensors by the name of their field, or where a field has several, by its name and a number."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.name != "keys"}
    views = {f"{_VIEWS}.{index}": view for index, view in enumerate(values.pop(_VIEWS))}
    return values | views


def _batch(tensors: Mapping[str, Any], keys: list[str]) -> Batch:
    """Undo `_tensors`."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(_VIEWS)}
    views = tuple(tensor for name, tensor in tensors.items() if name.startswith(_VIEWS))
    return Batch(**plain, teacher_images=views, keys=keys)


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Turn pixels into the input of a tower: (images / 255 - mean) / std, on the images' device.

    Args:
        images: uint8 [n, 3, height, width], or [n, frames, 3, height, width] of clips.
        mean: mean of each channel, for pixels in 0..1.
        std: standard deviation of each channel, for pixels in 0..1.

    Returns:
        float32 of the same shape.
    """
    # One subtraction and one multiplication over the images; the factor 1/255 is folded into the constants.
    constants = 255 * torch.tensor(mean, dtype=torch.float32), 1 / (255 * torch.tensor(std, dtype=torch.float32))
    # A constant made on a GPU from numbers of the host would wait for the GPU.
    offset, scale = (constant.view(3, 1, 1).to(images.device, non_blocking=True) for constant in constants)
    if images.device.type == "cpu" and len(images) > 1:
        # An image at a time stays in the processor's cache: four times as fast as the whole batch.
        return torch.stack([image.float().sub_(offset).mul_(scale) for image in images])
    return images.float().sub_(offset).mul_(scale)
