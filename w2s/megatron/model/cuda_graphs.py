"""A tower's layers as CUDA graphs: a GPU replays them without being told of every kernel."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LayerGraphs:
    """Runs the layers of a tower from CUDA graphs, captured at the first training pass; one for each layer.

    So gradients are reduced layer by layer, as without graphs. All passes must have as many tokens as the first one,
    and the backward pass of one must be over before the next one begins: activations lie where the graphs have them.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = list(layers)
        self._graphs: Any = ()

    def __call__(self, hidden: Tensor, packing: Tensor) -> Tensor:
        """Return what the layers make of packed tokens [tokens, 1, width]; `packing` is PackedAttention's mask."""
        if not self._graphs:
            bare = tuple(_Layer(layer, packing) for layer in self._layers)
            samples = tuple((torch.zeros_like(hidden).requires_grad_(),) for _ in bare)
            self._graphs = torch.cuda.make_graphed_callables(bare, samples)
        for graph in self._graphs:
            hidden = graph(hidden)
        return hidden


class _Layer(nn.Module):
    """A layer as a function of the tokens alone."""

    def __init__(self, layer: nn.Module, packing: Tensor) -> None:
        super().__init__()
        self.layer, self.packing = layer, packing

    def forward(self, hidden: Tensor) -> Tensor:
        output, _ = self.layer(hidden_states=hidden, attention_mask=self.packing)
        return output
