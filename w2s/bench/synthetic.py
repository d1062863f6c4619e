"""A batch of noise: the fields, the shapes and the drawn numbers of real samples, without reading any."""

import numpy as np
import torch

from w2s.data.samples.batch import Batch
from w2s.data.samples.sample import SampleSpec, draw_branches, draw_kept, draw_mask


def synthetic_batch(spec: SampleSpec, size: int, vocabulary: int, seed: int = 0) -> Batch:
    """Return a batch of noise, in pinned memory where there is a GPU; the last token ends a caption."""
    noise = torch.Generator().manual_seed(seed)
    indices = range(size)
    masks = np.stack([draw_mask(spec, seed, index) for index in indices]) if spec.masked_patches else None
    kept = np.stack([draw_kept(spec, seed, index) for index in indices]) if spec.num_kept_patches else None
    branches = np.stack([draw_branches(spec, seed, index) for index in indices]) if spec.drop_path else None
    batch = Batch(
        images=_pixels(size, spec.frames, spec.image_size, noise),
        teacher_images=tuple(_pixels(size, spec.frames, side, noise) for side in spec.teacher_sizes),
        masks=None if masks is None else torch.from_numpy(masks),
        kept=None if kept is None else torch.from_numpy(kept),
        branch_scales=None if branches is None else torch.from_numpy(branches),
        tokens=_tokens(size, spec.context_length, vocabulary, noise) if spec.context_length else None,
        caption_hashes=torch.arange(size) if spec.context_length else None,
        keys=[f"noise-{index}" for index in indices],
        indices=torch.arange(size),
    )
    return batch.pinned() if torch.cuda.is_available() else batch


def _pixels(size: int, frames: int, side: int, noise: torch.Generator) -> torch.Tensor:
    shape = (size, 3, side, side) if frames == 1 else (size, frames, 3, side, side)
    return torch.randint(256, shape, dtype=torch.uint8, generator=noise)


def _tokens(size: int, length: int, vocabulary: int, noise: torch.Generator) -> torch.Tensor:
    tokens = torch.randint(1, vocabulary - 1, (size, length), generator=noise)
    tokens[:, -1] = vocabulary - 1
    return tokens
