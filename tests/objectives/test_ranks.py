"""The contrastive losses over several ranks: the mean of the ranks' losses and gradients is the global batch's."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.distributed import run_ranks
from tests.objectives.pairs import (
    TOLERANCE,
    Loss,
    assert_close,
    exactly,
    features,
    sigmoid_definition,
    softmax_definition,
    with_known_gradients,
)
from w2s.config.sections import ParallelConfig
from w2s.megatron.parallel import process_groups
from w2s.objectives.contrastive import contrastive_loss
from w2s.objectives.sigmoid import sigmoid_loss

COUNT = 16
LABELS = torch.arange(COUNT) % 5

Results = list[Tensor]
Case = tuple[Loss, Loss, tuple[Tensor, ...]]


def twins() -> tuple[Tensor, ...]:
    """Pairs of which the first of one half and the first of the other are the same."""
    images, texts, scale = features(COUNT)
    images[COUNT // 2], texts[COUNT // 2] = images[0], texts[0]
    return images, texts, scale


def cases() -> dict[str, Case]:
    """By name: the loss, its definition, its inputs over the global batch."""
    return {
        "softmax": (contrastive_loss, softmax_definition, twins()),
        "sigmoid": (sigmoid_loss, sigmoid_definition, (*twins(), torch.tensor(-3.0))),
    }


def share(name: str, rank: int, size: int, group: ProcessGroup, labels: Tensor | None = None) -> Results:
    """What this rank gets for its part of the global batch; the last tile is uneven."""
    loss, _, (images, texts, *scalars) = cases()[name]
    local = slice(rank * COUNT // size, (rank + 1) * COUNT // size)
    inputs = [images[local], texts[local], *scalars]
    return with_known_gradients(loss, inputs, group=group, labels=None if labels is None else labels[local], tile=3)


def mean(parts: Sequence[Results]) -> Results:
    """The mean over the ranks, each of which has nothing for the others' features."""
    loss, images, texts, *scalars = zip(*parts, strict=True)
    features = [torch.cat(gradients) / len(parts) for gradients in (images, texts)]
    return [torch.stack(loss).mean(), *features, *(torch.stack(values).mean() for values in scalars)]


def tensor_parallel() -> dict[tuple[str, str], Results]:
    """Over the data-parallel group, with and without labels, and as it must not be: over the world."""
    with process_groups.initialize_groups(ParallelConfig(tensor=2), torch.device("cpu")) as ranks:
        rank, size, data = ranks.data_rank, ranks.data_size, ranks.data_group
        return {
            (name, way): share(name, rank, size, group, labels)
            for name in cases()
            for way, group, labels in (
                ("pairs", data, None),
                ("labels", data, LABELS),
                ("world", dist.group.WORLD, None),
            )
        }


@pytest.fixture(scope="module")
def parts() -> list[dict[tuple[str, str], Results]]:
    """What each of 4 ranks got, as TP2 x DP2."""
    return run_ranks(tensor_parallel, 4)


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize(("way", "labels"), [("pairs", None), ("labels", LABELS)])
def test_data_parallel_ranks_average_to_the_global_batch(
    parts: list[dict[tuple[str, str], Results]], name: str, way: str, labels: Tensor | None
) -> None:
    """Twins on two ranks are negatives of each other once."""
    _, definition, inputs = cases()[name]
    for group in (parts[0::2], parts[1::2]):
        assert_close(mean([part[name, way] for part in group]), exactly(definition, inputs, labels))


@pytest.mark.parametrize("name", cases())
def test_the_world_would_make_every_positive_a_negative_too(
    parts: list[dict[tuple[str, str], Results]], name: str
) -> None:
    """Tensor-parallel ranks hold the same features: over the world each pair is there twice."""
    _, definition, (images, texts, *scalars) = cases()[name]
    once = exactly(definition, (images, texts, *scalars))
    twice = exactly(definition, (images.repeat(2, 1), texts.repeat(2, 1), *scalars))
    over_world = torch.stack([part[name, "world"][0] for part in parts]).mean()
    assert float(over_world) == pytest.approx(float(twice[0]), rel=TOLERANCE)
    assert float(twice[0]) > float(once[0]) + 0.5
