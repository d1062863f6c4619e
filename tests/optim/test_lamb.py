"""LAMB against a few independent lines in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_ranks
from w2s.optim.lamb import Lamb

LR, BETAS, EPS = 0.02, (0.9, 0.95), 1e-6
STEPS = 5
SHAPES = ((6, 5), (7,), (3, 4))
SIZES = (30.0, 0.01, 1.0)
"""Size of the entries of each tensor: far above the updates', far below, and like them."""

Bounds = tuple[float, float] | None
Exempt = tuple[int, ...]
"""Numbers of the tensors without a trust ratio."""


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator) * size for shape, size in zip(SHAPES, SIZES, strict=True)]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def definition(decay: float, bounds: Bounds, exempt: Exempt = ()) -> list[Tensor]:
    """All tensors after `STEPS` steps (You et al. 2020, algorithm 2), the ratio clamped as DeepSpeed does."""
    finished = []
    for number, first in enumerate(start()):
        weight, m, v = first.double(), torch.zeros(first.shape).double(), torch.zeros(first.shape).double()
        for step in range(1, STEPS + 1):
            g = gradients(step)[number].double()
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g * g
            update = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS) + decay * weight
            ratio = float(weight.norm() / update.norm())
            ratio = ratio if bounds is None else min(max(ratio, bounds[0]), bounds[1])
            weight = weight - LR * (1.0 if number in exempt else ratio) * update
        finished.append(weight)
    return finished


def whole(decay: float, bounds: Bounds, exempt: Exempt = ()) -> list[Tensor]:
    """Two parameter groups of whole tensors."""
    weights = [torch.nn.Parameter(weight) for weight in start()]
    groups = [{"params": weights[:1]}, {"params": weights[1:]}]
    optimizer = Lamb(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, trust_ratio=bounds)
    if exempt:
        numbers = {weight: number for number, weight in enumerate(weights)}
        optimizer.share(numbers, len(weights), lambda sums: sums, exempt)
    for step in range(1, STEPS + 1):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        optimizer.step()
    return [weight.detach() for weight in weights]


def sliced(decay: float, bounds: Bounds, exempt: Exempt) -> list[Tensor]:
    """This rank's part of one flat buffer of all tensors, as Megatron's distributed optimizer cuts it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.cat([torch.full((weight.numel(),), number) for number, weight in enumerate(start())])
    own = torch.arange(len(numbers)).tensor_split(size)[rank]

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        return [flat[own][numbers[own] == number] for number in numbers[own].unique()]

    def reduce_norms(sums: Tensor) -> Tensor:
        dist.all_reduce(sums)
        return sums

    slices = [torch.nn.Parameter(piece) for piece in cut(start())]
    optimizer = Lamb(slices, lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, trust_ratio=bounds)
    optimizer.share(dict(zip(slices, numbers[own].unique().tolist(), strict=True)), len(SHAPES), reduce_norms, exempt)
    for step in range(1, STEPS + 1):
        for piece, gradient in zip(slices, cut(gradients(step)), strict=True):
            piece.grad = gradient
        optimizer.step()
    return [piece.detach() for piece in slices]


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for value, reference in zip(ours, theirs, strict=True):
        # Float32 against float64, five steps.
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))


CASES: list[tuple[float, Bounds, Exempt]] = [
    *((decay, bounds, ()) for decay in (0.0, 0.1) for bounds in (None, (0.05, 10.0))),
    (0.0, None, (1,)),
    (0.1, (0.05, 10.0), (0, 1)),
]


@pytest.mark.parametrize(("decay", "bounds", "exempt"), CASES)
def test_equals_the_definition(decay: float, bounds: Bounds, exempt: Exempt) -> None:
    assert_close(whole(decay, bounds, exempt), definition(decay, bounds, exempt))


def test_both_bounds_act() -> None:
    free, bounded = whole(0.0, None), whole(0.0, (0.05, 10.0))
    changed = [not torch.equal(*tensors) for tensors in zip(free, bounded, strict=True)]
    assert changed == [True, True, False]  # the large one by the upper bound, the small one by the lower


def all_slices() -> list[list[Tensor]]:
    return [sliced(*case) for case in CASES]


def test_slices_over_ranks_are_whole_tensors() -> None:
    parts = run_ranks(all_slices, 2)
    for number, case in enumerate(CASES):
        ours = torch.cat([piece for part in parts for piece in part[number]])
        pieces = ours.split([torch.Size(shape).numel() for shape in SHAPES])
        shaped = [piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]
        assert_close(shaped, definition(*case))


def test_a_tensor_without_a_ratio_moves_as_adamws() -> None:
    plain, rescaled = whole(0.0, None, (0, 1, 2)), whole(0.0, None, (1,))
    weights = [torch.nn.Parameter(weight) for weight in start()]
    adamw = torch.optim.AdamW(weights, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    for step in range(1, STEPS + 1):
        for weight, gradient in zip(weights, gradients(step), strict=True):
            weight.grad = gradient
        adamw.step()
    assert_close(plain, [weight.detach().double() for weight in weights])
    assert [torch.equal(*tensors) for tensors in zip(plain, rescaled, strict=True)] == [False, True, False]


def one_step(first: Tensor, bounds: Bounds = None) -> Tensor:
    weight = torch.nn.Parameter(first.clone())
    weight.grad = torch.randn(first.shape, generator=torch.Generator().manual_seed(1))
    Lamb([weight], lr=LR, eps=1e-9, weight_decay=0.0, trust_ratio=bounds).step()
    return weight.detach() - first


def test_trust_ratio_acts_at_weight_decay_zero() -> None:
    weight = torch.randn(40, generator=torch.Generator().manual_seed(0))
    small, large = one_step(weight), one_step(100 * weight)
    # Without the ratio both steps would be as long.
    assert float(large.norm() / small.norm()) == pytest.approx(100, rel=1e-4)
    assert float(small.norm()) == pytest.approx(LR * float(weight.norm()), rel=1e-4)


@pytest.mark.parametrize("bounds", [None, (0.01, 0.5)])
def test_a_tensor_of_zeros_moves_by_the_learning_rate(bounds: Bounds) -> None:
    assert float(one_step(torch.zeros(4), bounds).abs().max()) == pytest.approx(LR, rel=1e-4)


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors without values stand for those of a GPU: reading one fails."""
    weights = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = Lamb(weights, lr=LR, weight_decay=0.1, trust_ratio=(0.01, 10.0))
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        weights[0].sum().item()
