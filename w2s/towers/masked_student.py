"""The student of the masked stage: a vision tower that predicts its teachers' features at masked patches."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from w2s.config.sections import MimConfig, ParallelConfig, VisionConfig
from w2s.config.teacher_losses import Target
from w2s.megatron.fp8.linears import LOCAL, Linears
from w2s.megatron.model.taps import Tap
from w2s.towers.norms import make_norm
from w2s.towers.vision import VisionTower, image_head

LayerLoss = Callable[[int, Tensor], Tensor]
"""Takes the index of a layer and what its head predicts [n, k, width], returns a loss: a float32 scalar."""


class Outputs(NamedTuple):
    """What a student predicts of n images, or what it is to predict."""

    patches: Tensor
    """Features at k patches: [n, k, d]."""
    summary: Tensor | None
    """Embeddings: [n, e]; None in a stage without a summary target."""

    def flatten(self) -> Tensor:
        """Everything of an image, flattened: [n, k * d + e]."""
        flat = self.patches.flatten(1)
        return flat if self.summary is None else torch.cat([flat, self.summary], dim=1)

    @classmethod
    def unflatten(cls, flattened: Tensor, target: Target) -> "Outputs":
        """The inverse, for the d and e of `target`."""
        patches, summary = flattened.split([flattened.shape[1] - target.summary_width, target.summary_width], dim=1)
        return cls(patches.unflatten(1, (-1, target.width)), summary if target.summary_width else None)


def outputs_of(tensors: Sequence[Tensor], targets: Sequence[Target]) -> tuple[Outputs, ...]:
    """What is predicted of each teacher, of what `MaskedStudent` returns."""
    # Megatron's FSDP looks for tensors in the returned tuple itself, not in tuples within it.
    left = iter(tensors)
    return tuple(Outputs(next(left), next(left) if target.summary_width else None) for target in targets)


def unflatten_outputs(flattened: Tensor, targets: Sequence[Target]) -> tuple[Outputs, ...]:
    """What is predicted of each teacher, or is to be, of the flattened outputs that `MaskedStudent.predict` makes."""
    summaries = sum(target.summary_width for target in targets)
    patches = (flattened.shape[1] - summaries) // sum(target.width for target in targets)
    parts = flattened.split([patches * target.width + target.summary_width for target in targets], dim=1)
    return tuple(Outputs.unflatten(part, target) for part, target in zip(parts, targets, strict=True))


class MaskedStudent(VisionTower):
    """BEiT-style student: all tokens go through the layers, masked ones as a learned mask token.

    Source: baaivision/EVA, EVA-01/eva/modeling_pretrain.py. A student that drops what is masked has no such token, and
    sees the other patches alone, as under patch dropout.

    It has heads for each teacher (see `_add_heads`): those of the first are its own, under the names that a single
    teacher's have, and those of the others are in `teachers`.
    """

    def __init__(
        self,
        shape: VisionConfig,
        targets: Sequence[Target],
        parallel: ParallelConfig,
        dtype: torch.dtype,
        chunk: int = 0,
        linears: Linears = LOCAL,
        drop_masked: bool = False,
        layer_widths: Mapping[int, int] | None = None,
        embed_dim: int = 0,
    ) -> None:
        """Build a chunk; `layer_widths` are the channels to predict after layers, by their index over all chunks."""
        super().__init__(shape, sum(target.width for target in targets), parallel, dtype, chunk, linears)
        self.drop_masked = drop_masked
        if self.first and not drop_masked:
            self.mask_token = nn.Parameter(torch.empty(1, 1, shape.width, dtype=dtype))
        first, *others = targets
        if self.last:
            _add_heads(self, shape, first, embed_dim, dtype)
        self.teachers = nn.ModuleDict({target.name: nn.Module() for target in others if self.last})
        for heads, target in zip(self.teachers.values(), others, strict=False):
            _add_heads(heads, shape, target, embed_dim, dtype)
        local_widths = {layer: width for layer, width in (layer_widths or {}).items() if layer in self.layer_numbers}
        self.layer_heads = nn.ModuleDict(
            {str(layer): LayerHead(shape, width, dtype) for layer, width in local_widths.items()}
        )

    def forward(
        self,
        images: Tensor,
        masks: Tensor,
        patch_indices: Tensor,
        layer_loss: LayerLoss | None = None,
        branch_scales: Tensor | None = None,
    ) -> tuple[Tensor, ...] | Tensor:
        """Predict the features of each teacher at some patches, and its summary where that is a target.

        Args:
            images: [n, 3, side, side], normalised.
            masks: bool [n, patches], True at masked patches.
            patch_indices: int64 [n, k], the patches to predict; where the masked ones are dropped, all others.
            layer_loss: what the predictions after single layers go into; without it none are made.
            branch_scales: [n, layers, 2], what drop path multiplies the layers' branches with; None leaves none out.

        Returns:
            In the last chunk the predictions of each teacher in turn: [n, k, d] of the patches, then [n, e] of the
            summary if there is one (see `outputs_of`). Packed tokens elsewhere.
        """

        def predicted_tokens(tokens: Tensor) -> Tensor:
            patches = self.of_patches(tokens)
            return patches if self.drop_masked else gather_patches(patches, patch_indices)

        def tap(layer: str, head: nn.Module, layer_losses: LayerLoss) -> Tap:
            return lambda tokens: layer_losses(int(layer), head(predicted_tokens(tokens)))

        taps = {int(layer): tap(layer, head, layer_loss) for layer, head in self.layer_heads.items() if layer_loss}
        visible: dict[str, Tensor] = {"kept": patch_indices} if self.drop_masked else {"masks": masks}
        tokens = self.encode(images, **visible, taps=taps, branch_scales=branch_scales)
        if not self.last:
            return tokens
        patches = predicted_tokens(tokens)
        outputs = (Outputs(heads.lm_head(patches), self._summary(heads, tokens)) for heads in self._heads)
        return tuple(tensor for each in outputs for tensor in each if tensor is not None)

    def predict(self, images: Tensor, masks: Tensor, patch_indices: Tensor) -> Tensor:
        """As `forward`, with everything of an image flattened in the last chunk, a teacher after the other."""
        outputs = self(images, masks, patch_indices)
        return outputs if isinstance(outputs, Tensor) else torch.cat([each.flatten(1) for each in outputs], dim=1)

    def embed(self, images: Tensor, teacher: int = 0) -> Tensor:
        """Embed whole images as the CLIP will whose projection that of a teacher is: [n, embed_dim] in the last chunk.

        Args:
            images: [n, 3, side, side], normalised.
            teacher: the teacher's index.
        """
        tokens = self.encode(images)
        return self.embedding(tokens, self._heads[teacher].head) if self.last else tokens

    @property
    def _heads(self) -> list[Any]:
        """What has the heads for each teacher, in the last chunk."""
        return [self, *self.teachers.values()]

    def _summary(self, heads: Any, tokens: Tensor) -> Tensor | None:
        """The summary that such heads predict, None without that target."""
        if not hasattr(heads, "head"):
            return None
        embeddings = self.embedding(tokens, heads.head)
        return heads.summary_proj(embeddings) if hasattr(heads, "summary_proj") else embeddings


def _add_heads(module: nn.Module, shape: VisionConfig, target: Target, embed_dim: int, dtype: torch.dtype) -> None:
    """Give a module what predicts a teacher: `lm_head` its patches, and with a summary target `head` that.

    `head` is that of a CLIP's image tower; where the target has another width than it gives, `summary_proj`, a linear
    of this stage alone, leads from the one to the other.
    """
    module.lm_head = nn.Linear(shape.width, target.width, dtype=dtype)
    if target.summary_width:
        module.head = image_head(shape, embed_dim, dtype)
        if target.summary_width != embed_dim:
            module.summary_proj = nn.Linear(embed_dim, target.summary_width, bias=False, dtype=dtype)


class LayerHead(nn.Sequential):
    """From the patch tokens after a layer to the features of a layer of the teacher: a norm and a linear."""

    def __init__(self, shape: VisionConfig, target_width: int, dtype: torch.dtype) -> None:
        norm = make_norm(shape.norm, shape.width, shape.norm_eps, dtype)
        super().__init__(OrderedDict(norm=norm, linear=nn.Linear(shape.width, target_width, dtype=dtype)))


def masked_patch_indices(masks: Tensor, count: int) -> Tensor:
    """Return where masks [n, patches] of exactly `count` patches each are True: int64 [n, count], ascending."""
    # No `nonzero`, which would wait for the device to learn how many there are.
    return masks.byte().topk(count, dim=1).indices.sort(dim=1).values


def patch_indices_to_predict(masks: Tensor, mim: MimConfig) -> Tensor:
    """Return the patches of masks [n, patches] that the loss of `mim` is on: int64 [n, k], ascending."""
    count = mim.predicted(masks.shape[1])
    if count == masks.shape[1]:
        return all_patch_indices(masks)
    return masked_patch_indices(~masks if mim.predict == "visible" else masks, count)


def all_patch_indices(masks: Tensor) -> Tensor:
    """Return all patch indices of masks [n, patches]: int64 [n, patches], ascending."""
    return torch.arange(masks.shape[1], device=masks.device).expand_as(masks)


def gather_patches(features: Tensor, patch_indices: Tensor) -> Tensor:
    """Pick from patch features [n, patches, d] those at patch indices [n, k]: [n, k, d]."""
    return features.gather(1, patch_indices.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def scatter_patches(features: Tensor, patch_indices: Tensor, patches: int) -> Tensor:
    """Spread features [n, k, d] of the patch indices [n, k] over all patches, NaN at the others: [n, patches, d]."""
    whole = features.new_full((len(features), patches, features.shape[-1]), torch.nan)
    return whole.scatter(1, patch_indices.unsqueeze(-1).expand_as(features), features)
