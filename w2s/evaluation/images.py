"""The images of a test set: decoded when they are asked for, by reading processes, and never all in memory."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import IterableDataset, get_worker_info

from w2s.config.sections import Resize
from w2s.data.samples.decode import decode_image
from w2s.data.samples.frames import choose_frames, is_video
from w2s.data.shards.containers import read_shard
from w2s.data.shards.raw_sample import BadSample, RawSample, find_images
from w2s.data.stream.workers import RESTARTS, end_reading, kill_readers, start_workers, with_errors
from w2s.errors import DataError
from w2s.evaluation.dataset import EvalSet

logger = logging.getLogger(__name__)

PIECE = 32
"""Images that a reading process hands over at a time: few, so that all of them work on the same batch."""


@dataclass(frozen=True)
class ImageBatch:
    """Some images of a test set, at the sizes that were asked for."""

    indices: Tensor
    """Their indices in the set, int64 [b]."""
    views: tuple[Tensor, ...]
    """uint8 [b, 3, S, S] for each size S, or with several frames [b, frames, 3, S, S]."""

    @property
    def images(self) -> Tensor:
        """The view of the first size."""
        return self.views[0]


@dataclass(frozen=True, kw_only=True)
class View:
    """What is made of each image."""

    sizes: tuple[int, ...]
    """Sides of the views in pixels."""
    how: Resize
    """How an image becomes square, see `eval_transform`."""
    image_key: str
    """Extensions of the image, separated by `;`; the first that is there is taken."""
    frames: int = 1
    """Frames of a clip that are seen; with several, an image is a clip of equal frames."""

    def decode(self, shards: Sequence[str], places: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Read and decode samples: uint8 [n, 3, S, S] for each size, or with several frames [n, frames, 3, S, S].

        Args:
            shards: those that `places` counts.
            places: where the samples begin, [n, 2]: index of the shard and place in it.

        Raises:
            DataError: an image is missing or cannot be decoded.
        """
        samples = [self._views(sample) for sample in _read(shards, places, frozenset(self.image_key.split(";")))]
        return tuple(torch.stack(views) for views in zip(*samples, strict=True))

    def _views(self, sample: RawSample) -> list[Tensor]:
        """An image or a clip at all sizes."""
        images = find_images(sample.files, self.image_key)
        if not images:
            reason = (
                f"{sample.damage}, repair the test set"
                if sample.damage
                else (f"no image .{self.image_key}, set data.image_key or repair the test set")
            )
            raise DataError(f"{sample.shard}: {sample.key}: {reason}")
        try:
            return view(images, self.frames, self.sizes, self.how)
        except BadSample as error:
            raise DataError(f"{sample.shard}: {sample.key}: {error}, repair the test set") from error


@dataclass(frozen=True, kw_only=True)
class EvalImages:
    """Images of a test set, in an order."""

    data: EvalSet
    indices: NDArray[np.int64]
    """Which of its images, in order."""
    view: View
    workers: int
    """Reading processes; 0 reads in this one."""
    group: dist.ProcessGroup | None = None
    """Ranks that need the same batches (those of a model-parallel group): each decodes a share; None for this one."""
    device: torch.device | str = "cpu"
    """Where the ranks of the group exchange images."""

    def __len__(self) -> int:
        return len(self.indices)

    def only(self, indices: NDArray[np.int64]) -> "EvalImages":
        """Return the images of the set with some indices."""
        return replace(self, indices=indices)

    def batches(self, ranges: Sequence[range]) -> Iterator[ImageBatch]:
        """Decode batches, each of the images at some places of the order; every rank of the group calls.

        Raises:
            DataError: an image is missing or cannot be decoded.
        """
        indices = [self.indices[each.start : each.stop] for each in ranges]
        local = [self._share(batch) for batch in indices]
        parts = self._parts([batch[start : start + PIECE] for batch in local for start in range(0, len(batch), PIECE)])
        for batch, share in zip(indices, local, strict=True):
            views = [next(parts) for _ in range(0, len(share), PIECE)]
            whole = [self._gathered(torch.cat(view))[: len(batch)] for view in zip(*views, strict=True)]
            yield ImageBatch(torch.from_numpy(batch), tuple(whole))

    def read(self) -> tuple[Tensor, ...]:
        """Decode all of them in this process: uint8 [n, 3, S, S] for each size; for a few, such as those of a picture.

        Raises:
            DataError: an image is missing or cannot be decoded.
        """
        return self.view.decode(self.data.shards, self.data.locations[self.indices])

    def _parts(self, pieces: Sequence[NDArray[np.int64]]) -> Iterator[tuple[Tensor, ...]]:
        """Views of pieces of batches, in order; with new reading processes where one died."""
        done = 0
        for _ in range(RESTARTS):
            parts = start_workers(_Pieces(self.view, self.data, pieces[done:]), min(self.workers, len(pieces) - done))
            try:
                for part in parts:
                    if isinstance(part, DataError):
                        raise part
                    yield part
                    done += 1
                return
            except (RuntimeError, OSError, EOFError) as error:  # torch or a broken connection: a process was killed
                logger.warning("a reading process of the evaluation died, its images are read again: %s", error)
                kill_readers(parts)
            finally:
                end_reading(parts)
        raise DataError(
            f"reading processes of the evaluation die again and again: is there enough memory? "
            f"Lower data.workers={self.workers}"
        )

    def _share(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """What this rank decodes of a batch; the last ranks repeat its last image where it does not divide."""
        if self.group is None:
            return batch
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = -(-len(batch) // size)
        padded = np.pad(batch, (0, share * size - len(batch)), mode="edge")
        return padded[rank * share : (rank + 1) * share]

    def _gathered(self, local: Tensor) -> Tensor:
        """A batch of which each rank of the group has decoded a share."""
        if self.group is None or dist.get_world_size(self.group) == 1:
            return local
        local = local.to(self.device)
        whole = local.new_empty(dist.get_world_size(self.group) * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(whole, local, group=self.group)
        return whole


def view(images: Sequence[bytes], frames: int, sizes: Sequence[int], how: Resize) -> list[Tensor]:
    """Decode the image or the clip of a sample, and make it square as `eval_transform` does.

    Args:
        images: what `find_images` has found.
        frames: frames of a clip that are seen; an image is a clip of equal frames.
        sizes: sides of the squares in pixels.
        how: see `eval_transform`.

    Returns:
        uint8 [3, S, S] for each size S, or with several frames [frames, 3, S, S].

    Raises:
        BadSample: an image is damaged or too large, or a video too long.
    """
    still = len(images) == 1 and not is_video(images[0])
    pictures = choose_frames(images, 1 if still else frames)
    pixels = [torch.from_numpy(decode_image(picture)).permute(2, 0, 1) for picture in pictures]
    views = [torch.stack([eval_transform(each, size, how) for each in pixels]) for size in sizes]
    return [each[0] if frames == 1 else each.expand(frames, -1, -1, -1) for each in views]


def stills(images: Tensor) -> Tensor:
    """Return images as they are, and the middle frames of clips: uint8 [n, 3, S, S]."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def eval_transform(pixels: Tensor, image_size: int, how: Resize) -> Tensor:
    """CLIP's test transform of an image to a square: an antialiased bicubic resize.

    Args:
        pixels: uint8 [3, height, width].
        image_size: side of the square in pixels, S.
        how: `crop` resizes the shorter side to S and takes the centre, `squash` both sides (EVA-CLIP-18B, section 7).

    Returns:
        uint8 [3, S, S].
    """
    height, width = pixels.shape[1:]
    shorter = min(height, width)
    size = [image_size] * 2 if how == "squash" else [image_size * side // shorter for side in (height, width)]
    if size != [height, width]:
        pixels = functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]
    top, left = (round((side - image_size) / 2) for side in size)
    return pixels[:, top : top + image_size, left : left + image_size]


class _Pieces(IterableDataset[tuple[Tensor, ...] | DataError]):
    """Views of pieces of batches, for torch's DataLoader; piece i is from worker i % workers; an error is the last."""

    def __init__(self, view: View, data: EvalSet, pieces: Sequence[NDArray[np.int64]]) -> None:
        self._view, self._shards, self._pieces = view, data.shards, [data.locations[piece] for piece in pieces]

    def __iter__(self) -> Iterator[tuple[Tensor, ...] | DataError]:
        worker = get_worker_info()
        pieces = self._pieces[worker.id :: worker.num_workers] if worker else self._pieces
        return with_errors(self._view.decode(self._shards, piece) for piece in pieces)


def _read(shards: Sequence[str], places: NDArray[np.int64], wanted: frozenset[str]) -> Iterator[RawSample]:
    """Read samples; those that follow one another in a shard are read in one go."""
    samples: Iterator[RawSample] = iter(())
    following = None
    for shard, start in places.tolist():
        if (shard, start) != following:
            samples = read_shard(shards[shard], start, wanted)
        sample = next(samples)
        following = (shard, sample.end)
        yield sample
