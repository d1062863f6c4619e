"""Losses on the tokens between a tower's layers, on whichever pipeline stage the layer is.

A pipeline stage gets the gradient of its output from the next stage and hands that of its input to the one before:
tensors inside of it have no part in the last stage's loss. So a stage's own loss is tied to its output, whose backward
pass, whenever the schedule comes to it, is then the loss's too (as the losses of experts in Megatron-Core,
`transformer/moe/moe_utils.py`).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

Tap = Callable[[Tensor], Tensor]
"""Takes the tokens [images, tokens, width] after a layer, returns a loss: a float32 scalar."""


@contextmanager
def hidden_states_at(blocks: TransformerBlock, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the packed tokens between layers of a chunk, for as long as the block lasts.

    It looks at what goes into the next layer: with `recompute=full` a layer's output inside of the recomputed function
    is without gradients, while its input is the very tensor outside.

    Args:
        blocks: the chunk's layers.
        layers: the layers, counted from 0 over all pipeline stages, after which the tokens are wanted.

    Returns:
        Packed tokens [tokens, 1, width] by layer, of all these layers of the chunk but its last one.
    """
    hidden_states: dict[int, Tensor] = {}

    def keep_input_of(index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, named: dict[str, Any]) -> None:
            hidden_states[index] = named["hidden_states"]

        return hook

    with ExitStack() as undo:
        for layer, following in pairwise(blocks.layers):
            if (index := layer.layer_number - 1) in layers:
                handle = following.register_forward_pre_hook(keep_input_of(index), with_kwargs=True)
                undo.callback(handle.remove)
        yield hidden_states


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """Return `hidden`; when a gradient comes back through them, `loss` gets one of 1."""
    # The schedule frees what it has sent, which a view would keep.
    attached: Tensor = make_viewless_tensor(_AttachLoss.apply(hidden, loss), requires_grad=True, keep_graph=True)
    return attached


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (grad_hidden,) = gradients
        return grad_hidden, grad_hidden.new_ones((), dtype=ctx.dtype)
