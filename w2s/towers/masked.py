"""The student of the masked stage: a vision tower that predicts the teacher's features at masked patches."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from w2s.config.sections import MimConfig, ParallelConfig, VisionConfig
from w2s.megatron.backend import LOCAL, Linears
from w2s.megatron.taps import Tap
from w2s.towers.norms import make_norm
from w2s.towers.vision import NORM_EPS, VisionTower

LayerLoss = Callable[[int, Tensor], Tensor]
"""Takes the number of a layer and what its head predicts [n, k, width], returns a loss: a float32 scalar."""


class MaskedStudent(VisionTower):
    """BEiT-style student: all tokens go through the layers, masked ones as a learned mask token.

    Source: baaivision/EVA, EVA-01/eva/modeling_pretrain.py. A student that drops what is masked has no such token, and
    sees the other patches alone, as under patch dropout.
    """

    def __init__(
        self,
        shape: VisionConfig,
        target_width: int,
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        linears: Linears = LOCAL,
        drops_masked: bool = False,
        layer_widths: Mapping[int, int] | None = None,
    ) -> None:
        """Build a chunk.

        Args:
            shape: the configuration of the tower.
            target_width: channels of the teacher's features.
            parallel: how the tower is split.
            dtype: type of the weights.
            chunk: number of the chunk on this pipeline stage.
            linears: what multiplies in the layers.
            drops_masked: leave masked patches out.
            layer_widths: channels to predict after some layers, by the layer's number over all pipeline stages.
        """
        super().__init__(shape, target_width, parallel, dtype, chunk, linears)
        self.drops_masked = drops_masked
        if self.first and not drops_masked:
            self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width, dtype=dtype))
        if self.last:
            self.lm_head = nn.Linear(shape.width, target_width, dtype=dtype)
        own = {number: width for number, width in (layer_widths or {}).items() if number in self.layer_numbers}
        self.layer_heads = nn.ModuleDict({str(number): LayerHead(shape, width, dtype) for number, width in own.items()})

    def forward(
        self,
        images: Tensor,
        masks: Tensor,
        places: Tensor,
        layer_loss: LayerLoss | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Predict the teacher's features at some patches.

        Args:
            images: [n, 3, side, side], normalised.
            masks: bool [n, patches], True at masked patches.
            places: int64 [n, k], the patches to predict; where the masked ones are dropped, all others.
            layer_loss: what the predictions after single layers go into; without it none are made.
            branches: [n, layers, 2], what drop path multiplies the layers' branches with; None leaves none out.

        Returns:
            [n, k, teacher width] in the last chunk, packed rows elsewhere.
        """

        def chosen(tokens: Tensor) -> Tensor:
            return tokens[:, 1:] if self.drops_masked else at_places(tokens[:, 1:], places)

        def tap(number: str, head: nn.Module, learn: LayerLoss) -> Tap:
            return lambda tokens: learn(int(number), head(chosen(tokens)))

        taps = {int(number): tap(number, head, layer_loss) for number, head in self.layer_heads.items() if layer_loss}
        seen: dict[str, Tensor] = {"kept": places} if self.drops_masked else {"masks": masks}
        tokens = self.encode(images, **seen, taps=taps, branches=branches)
        return self.lm_head(chosen(tokens)) if self.last else tokens


class LayerHead(nn.Sequential):
    """From the patch tokens after a layer to the features of a layer of the teacher: a norm and a linear."""

    def __init__(self, shape: VisionConfig, target_width: int, dtype: torch.dtype) -> None:
        norm = make_norm(shape.norm, shape.width, NORM_EPS, dtype)
        super().__init__(OrderedDict(norm=norm, linear=nn.Linear(shape.width, target_width, dtype=dtype)))


def masked_places(masks: Tensor, count: int) -> Tensor:
    """Return where masks [n, patches] of exactly `count` patches each are True: int64 [n, count], ascending."""
    # No `nonzero`, which would wait for the device to learn how many there are.
    return masks.byte().topk(count, dim=1).indices.sort(dim=1).values


def places_to_predict(masks: Tensor, mim: MimConfig) -> Tensor:
    """Return the patches of masks [n, patches] that the loss of `mim` is on: int64 [n, k], ascending."""
    count = mim.predicted(masks.shape[1])
    if count == masks.shape[1]:
        return everywhere(masks)
    return masked_places(~masks if mim.predict == "visible" else masks, count)


def everywhere(masks: Tensor) -> Tensor:
    """Return all places of masks [n, patches]: int64 [n, patches], ascending."""
    return torch.arange(masks.shape[1], device=masks.device).expand_as(masks)


def at_places(features: Tensor, places: Tensor) -> Tensor:
    """Pick from patch features [n, patches, d] those at places [n, k]: [n, k, d]."""
    return features.gather(1, places.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def put_at_places(features: Tensor, places: Tensor, patches: int) -> Tensor:
    """Spread features [n, k, d] of the places [n, k] over all patches, NaN at the others: [n, patches, d]."""
    whole = features.new_full((len(features), patches, features.shape[-1]), torch.nan)
    return whole.scatter(1, places.unsqueeze(-1).expand_as(features), features)
