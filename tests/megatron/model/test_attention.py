"""Which kernels attention takes, that nothing is copied around them, and that they agree."""

from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.megatron.spawn import SHAPE
from w2s.config.sections import ParallelConfig
from w2s.megatron.model.initialize import init_parameters
from w2s.megatron.model.layers import PackedAttention
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.initial import vision_rule
from w2s.towers.vision import VisionTower

IMAGES, TOKENS, HEADS, WIDTH = 3, 17, 2, 8


def attend(dtype: torch.dtype, causal: bool) -> tuple[Tensor, Tensor]:
    """The output and the gradient with respect to the packed query, key and value."""
    rows = torch.randn(3, IMAGES * TOKENS, 1, HEADS, WIDTH, generator=torch.Generator().manual_seed(0))
    packed = rows.bfloat16().to(dtype).requires_grad_()
    core = PackedAttention(None, AttnMaskType.causal if causal else AttnMaskType.no_mask)  # type: ignore[arg-type]
    output = core(*packed, attention_mask=torch.ones(IMAGES, TOKENS, dtype=torch.bool))
    output.float().square().sum().backward()
    assert packed.grad is not None
    return output.detach().float(), packed.grad.float()


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_agrees_with_float32(causal: bool) -> None:
    outputs, gradients = zip(attend(torch.float32, causal), attend(torch.bfloat16, causal), strict=True)
    # rounding to 8 bits errs by 2^-9 of a value, of which a few add up: outputs up to 2.2, gradients up to 8.3
    torch.testing.assert_close(*outputs, rtol=0, atol=2 * 2.2 * 2**-9)
    torch.testing.assert_close(*gradients, rtol=0, atol=3 * 8.3 * 2**-9)


class Recorded(TorchDispatchMode):
    """Counts the operators that run, by name, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operators(dtype: torch.dtype, device: str) -> tuple[Counter[str], Counter[str]]:
    """What a layer's self-attention runs from its input to the gradient by that: forward and backward."""
    tower = VisionTower(SHAPE, 1, ParallelConfig(), dtype).to(device)
    init_parameters(tower, vision_rule(SHAPE, post_norm=0.5), seed=1)
    rows = torch.randn(IMAGES * (1 + SHAPE.patches), 1, SHAPE.width, dtype=dtype, device=device, requires_grad=True)
    packing = torch.ones(IMAGES, 1 + SHAPE.patches, dtype=torch.bool, device=device)
    with Recorded() as forward:
        output, _ = tower.blocks.layers[0].self_attention(rows, attention_mask=packing)
    gradient = torch.ones_like(output)
    with Recorded() as backward:
        output.backward(gradient)
    return forward.counts, backward.counts


def test_nothing_is_copied_around_attention(alone: Ranks) -> None:
    """One of the two linears has a bias."""
    forward, backward = operators(torch.float32, "cpu")
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert forward == {"mm": 1, "addmm": 1, kernel: 1}
    # Two products for each of the two linears; one join of the gradients by query, key and value.
    assert backward == {"mm": 4, "sum": 1, f"{kernel}_backward": 1, "cat": 1}


@pytest.mark.gpu
def test_a_gpu_takes_flash_or_cudnn_and_copies_nothing(alone: Ranks) -> None:
    forward, backward = operators(torch.bfloat16, "cuda")
    (kernel,) = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"} & forward.keys()
    assert forward == {"mm": 2, kernel: 1}  # the bias is left to the add
    assert backward == {"mm": 4, f"{kernel}_backward": 1, "cat": 1}
