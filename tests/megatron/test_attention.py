"""Attention in bfloat16 takes another kernel on a CPU: it must agree with float32."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from w2s.megatron.layers import PackedAttention

IMAGES, TOKENS, HEADS, WIDTH = 3, 17, 2, 8


def attend(dtype: torch.dtype, causal: bool) -> tuple[Tensor, Tensor]:
    """The output and the gradient by the packed query, key and value."""
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
