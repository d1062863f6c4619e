import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from w2s.data.samples.batch import Batch, gather_batch, merge_batches, normalize, swap_batch


def make(indices: list[int], tokens: bool = True) -> Batch:
    rows = torch.tensor(indices)
    return Batch(
        images=rows.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous(),
        tokens=rows[:, None].expand(-1, 5) if tokens else None,
        keys=[f"k{index}" for index in indices],
        indices=rows,
    )


def test_micro_batches_share_memory_and_lose_nothing() -> None:
    batch = make([0, 1, 2, 3, 4])
    parts = batch.split(2)
    assert [part.keys for part in parts] == [["k0", "k1"], ["k2", "k3"], ["k4"]]
    assert [part.indices.tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[1].images.data_ptr() == batch.images[2].data_ptr()
    assert parts[1].masks is None


def test_parts_are_merged_in_global_order() -> None:
    merged = merge_batches([make([4, 0]), make([1, 3, 2])])
    assert merged.indices.tolist() == [0, 1, 2, 3, 4]
    assert merged.keys == ["k0", "k1", "k2", "k3", "k4"]
    assert merged.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert merged.tokens is not None
    assert merged.tokens[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert merge_batches([make([1], tokens=False), make([0], tokens=False)]).tokens is None


def make_whole(indices: list[int]) -> Batch:
    """With masks and branches, and what two teachers see."""
    whole = make(indices)
    rows = whole.indices[:, None]
    whole.masks, whole.branch_scales = rows > torch.arange(6), rows[..., None] / torch.ones(len(rows), 2, 2)
    whole.teacher_images = (rows.expand(-1, 3), rows.expand(-1, 5) + 1)
    return whole


def _exchanged() -> tuple[Batch, Batch]:
    """What the rank before gives, and all of all ranks."""
    rank, group = dist.get_rank(), dist.group.WORLD
    local = make_whole([rank, rank + 3, rank + 6])
    return swap_batch(local, group, to=(rank + 1) % 3, source=(rank - 1) % 3), gather_batch(local, group)


def test_ranks_exchange_whole_batches() -> None:
    expected = make_whole(list(range(9)))
    for rank, (swapped, gathered) in enumerate(run_ranks(_exchanged, 3)):
        before = torch.arange((rank - 1) % 3, 9, 3)
        for field in (field.name for field in dataclasses.fields(Batch) if field.name != "keys"):
            values = (getattr(each, field) for each in (expected, swapped, gathered))
            each = [value if isinstance(value, tuple) else (value,) for value in values]
            for whole, part, joined in zip(*each, strict=True):
                assert (whole is None) == (part is None) == (joined is None)
                assert whole is None or (torch.equal(joined, whole) and torch.equal(part, whole[before])), field


def test_to_moves_every_tensor() -> None:
    moved = make([0, 1]).to("meta")
    assert moved.images.is_meta
    assert moved.tokens is not None
    assert moved.tokens.is_meta
    assert moved.keys == ["k0", "k1"]


def test_normalize_is_mean_and_std_of_pixels_in_0_to_1() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    reference = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    result = normalize(images, mean, std)
    assert result.dtype == torch.float32
    # Values up to about 2.2 in float32, with two roundings more than the reference.
    assert result.double() == pytest.approx(reference, abs=1e-6)
    assert images[0, 0, 0, 1] == 1
