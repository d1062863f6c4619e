"""The patch embedding is a convolution, computed where a patch is kept and nowhere else."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from w2s.towers.patches import PatchEmbedding

PATCH, WIDTH, SIDE = 8, 16, 32
KEPT = torch.tensor([[0, 5, 7], [3, 4, 15]])


def embedding() -> tuple[PatchEmbedding, Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = PatchEmbedding(PATCH, WIDTH, torch.float32)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(generator=generator)
    return module, torch.randn(2, 3, SIDE, SIDE, generator=generator)


def test_it_is_a_convolution() -> None:
    module, images = embedding()
    convolved = torch.nn.functional.conv2d(images, module.weight, module.bias, stride=PATCH).flatten(2).transpose(1, 2)
    # Float32 sums of 192 products, of a size of 14.
    torch.testing.assert_close(module(images), convolved, rtol=0, atol=1e-4)
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(module(images, KEPT), convolved[rows, KEPT], rtol=0, atol=1e-4)


def test_dropped_patches_cost_nothing() -> None:
    module, images = embedding()
    with FlopCounterMode(display=False) as counter:
        module(images, KEPT).sum().backward()
    # Forward and the gradient with respect to the weight; the pixels get none.
    assert counter.get_total_flops() == 2 * 2 * KEPT.numel() * 3 * PATCH**2 * WIDTH
