"""Layers from CUDA graphs give the numbers of the plain ones; without a GPU, with stand-ins for the graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.megatron.spawn import SHAPE
from w2s.config.sections import ParallelConfig
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.initial import vision_rule
from w2s.towers.vision import VisionTower

SIZES = (3, 3, 3)
"""Images of the training passes: what is captured in the first must serve the others."""


def build(graphs: bool, device: str) -> VisionTower:
    tower = VisionTower(SHAPE, 1, ParallelConfig(cuda_graphs=graphs), torch.float32).to(device)
    init_parameters(tower, vision_rule(SHAPE, post_norm=0.5), seed=1)
    return tower


def images(number: int, count: int, device: str) -> Tensor:
    side = SHAPE.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(number)).to(device)


def passes(tower: VisionTower, device: str) -> list[Tensor]:
    """The loss of every pass, the gradients of all, and an output without gradients of another size."""
    losses = []
    for number, count in enumerate(SIZES):
        loss = tower.encode(images(number, count, device)).square().mean()
        loss.backward()
        losses.append(loss.detach().clone())
    gradients = [parameter.grad for parameter in tower.parameters() if parameter.grad is not None]
    with torch.no_grad():
        return [*losses, *gradients, tower.encode(images(9, 5, device))]


def assert_same(device: str) -> None:
    for ours, theirs in zip(passes(build(True, device), device), passes(build(False, device), device), strict=True):
        # The same kernels in the same order; on a GPU some add up in any order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_layers_are_captured_once_and_called_in_their_order(alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def capture(layers: tuple[nn.Module, ...], samples: tuple[tuple[Tensor], ...]) -> Any:
        assert [sample.shape for (sample,) in samples] == [(3 * 17, 1, SHAPE.width)] * SHAPE.layers
        assert all(sample.requires_grad for (sample,) in samples)

        def counted(number: int) -> Callable[[Tensor], Tensor]:
            return lambda rows: calls.append(number) or layers[number](rows)

        return tuple(counted(number) for number in range(len(layers)))

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    assert_same("cpu")
    assert calls == [0, 1] * len(SIZES), "one capture, and none for what has no gradients"


@pytest.mark.gpu
def test_graphs_on_a_gpu(alone: Ranks) -> None:
    assert_same("cuda")
