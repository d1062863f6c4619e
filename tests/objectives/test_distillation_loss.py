"""The losses of distillation against their definitions in float64, on one rank and on several."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss
from torch import Tensor

from tests.distributed import run_ranks
from tests.objectives.pairs import assert_close, features, with_known_gradients
from w2s.bench.call_cost import cost, in_fresh_process
from w2s.objectives.distillation_loss import affinity_loss, feature_loss

COUNT = 33


def teacher(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher of another width and another scale than `features`."""
    images, texts, scale = features(count + 1, width=7)
    return images[:count], texts[:count], scale * 1.5


def definition(images: Tensor, texts: Tensor, scale: Tensor, *of_teacher: Tensor) -> Tensor:
    theirs, others, their_scale = (value.double() for value in of_teacher)
    logits, right = scale * images @ texts.T, their_scale * theirs @ others.T
    ways = (logits, right), (logits.T, right.T)
    return sum(
        F.kl_div(our.log_softmax(1), their.log_softmax(1), reduction="batchmean", log_target=True)
        for our, their in ways
    ) / 2  # fmt: skip


def expected(count: int) -> list[Tensor]:
    inputs = [value.double() for value in features(count)]
    return with_known_gradients(lambda *student: definition(*student, *teacher(count)), inputs)


def ours(inputs: Sequence[Tensor], of_teacher: Sequence[Tensor], **options: object) -> list[Tensor]:
    return with_known_gradients(
        lambda *student, **rest: affinity_loss(*student, *of_teacher, **rest), inputs, **options
    )


@pytest.mark.parametrize("tile", [1, 7, 16, 1000])
def test_affinity_equals_the_definition(tile: int) -> None:
    assert_close(ours(features(COUNT), teacher(COUNT), tile=tile), expected(COUNT))


def test_affinity_has_the_gradients_of_open_clip() -> None:
    """Its cross entropy is larger by the teacher's entropy, which no gradient sees."""
    peer = DistillClipLoss()
    theirs = with_known_gradients(lambda *student: peer(*student, *teacher(20))[1], features(20))
    found = ours(features(20), teacher(20))
    assert_close(found[1:], theirs[1:])
    assert 0 < found[0] < theirs[0]


def test_nothing_is_left_to_learn_where_student_and_teacher_agree() -> None:
    """At the highest scale, where e^200 would be not a float32."""
    images, texts, _ = features(9)
    inputs = images, texts, torch.tensor(100.0)
    found = ours(inputs, [value.clone() for value in inputs], tile=4)
    assert all(float(value.abs().max()) == pytest.approx(0, abs=1e-5) for value in found)


def share_of_rank(count: int) -> list[Tensor]:
    """What this rank gets for its part of the global batch; the last tile is uneven."""
    rank, size = dist.get_rank(), dist.get_world_size()
    local = slice(rank * count // size, (rank + 1) * count // size)
    (images, texts, scale), (theirs, others, their_scale) = features(count), teacher(count)
    of_teacher = theirs[local], others[local], their_scale
    return ours([images[local], texts[local], scale], of_teacher, group=dist.group.WORLD, tile=3)


@pytest.mark.parametrize("size", [2, 4])
def test_data_parallel_ranks_average_to_the_global_batch(size: int) -> None:
    loss, images, texts, scale = zip(*run_ranks(share_of_rank, size, 16), strict=True)
    of_features = [torch.cat(gradients) / size for gradients in (images, texts)]
    assert_close([torch.stack(loss).mean(), *of_features, torch.stack(scale).mean()], expected(16))


def test_features_are_compared_by_their_cosine() -> None:
    student, (right, *_) = features(COUNT)[0], features(COUNT + 1)
    right = right[:COUNT]
    found = with_known_gradients(partial(feature_loss, teacher=right), [student])
    assert float(found[0]) == pytest.approx(float(2 - 2 * (student * right).sum(1).mean()), rel=1e-5)
    torch.testing.assert_close(found[1], 2 * (student - right) / COUNT)
    assert float(feature_loss(right, right)) == 0


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors without values stand for those of a GPU: reading one fails."""
    images, texts, scale = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((9, 4), (9, 4), ()))
    theirs, others, their_scale = (torch.empty(shape, device="meta") for shape in ((9, 6), (9, 6), ()))
    affinity_loss(images, texts, scale, theirs, others, their_scale, tile=4).backward()
    assert all(value.grad is not None and value.grad.is_meta for value in (images, texts, scale))


def peak(count: int) -> float:
    inputs = [value.requires_grad_() for value in features(count)]
    affinity_loss(*features(8), *teacher(8))  # loads the libraries
    return cost(lambda: affinity_loss(*inputs, *teacher(count), tile=512).backward()).mib


def test_memory_is_that_of_tiles() -> None:
    # One matrix of 8192 x 8192 would be 256 MiB, a tile is 1 MiB; eight of these are there at a time.
    assert in_fresh_process(peak, 8192) < 40
