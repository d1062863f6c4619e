"""How the tensors of a checkpoint fill those of a model: taken as they are, resized, missing, or of no use."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor

from w2s.checkpoint.weights.eva_format import HEAD_BIAS, NORM_PRE, is_fused, released_name, split_heads
from w2s.checkpoint.weights.released import Released
from w2s.errors import CheckpointError

Shape = tuple[int, ...]

STAGE_ONLY = ("vision.lm_head.", "vision.layer_heads.", "vision.mask_token", "vision.summary_proj.", "vision.teachers.")
"""What serves the masked stage alone."""
PROJECTIONS = ("vision.head.", "text.text_projection", "text.logit_scale", "text.logit_bias")
"""What a CLIP adds to its two towers."""
LOGIT_PARAMETERS = ("text.logit_scale", "text.logit_bias")
"""Those of them that belong to the loss."""
MASKED_STAGE = tuple(name.replace("vision.", "visual.") for name in STAGE_ONLY)
"""Released names of what serves the masked stage alone."""
OPTIONAL = (*MASKED_STAGE, "visual.head.", "text.text_projection", "logit_scale", "logit_bias")
"""Released names of both: what another stage may do without."""


@dataclass(frozen=True)
class Fit:
    """What a model takes of a checkpoint.

    Attributes:
        source: the checkpoint.
        shapes: the model's tensors by our names.
        heads: attention heads by tower.
        loaded: our names of tensors that are taken as they are.
        resized: our names of tensors that are resampled for another size.
        misfits: our names of tensors whose shapes cannot be made to fit.
        missing: our names of tensors that the checkpoint does not have.
        unexpected: released names of tensors that the model has no place for.
    """

    source: Released
    shapes: Mapping[str, Shape]
    heads: Mapping[str, int]
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def taken(self) -> list[str]:
        """Our names of all tensors that come from the checkpoint."""
        return self.loaded + self.resized

    @property
    def surplus(self) -> list[str]:
        """The checkpoint's own names of `unexpected`."""
        return [self.source.origin(name) for name in self.unexpected]

    def misfit(self) -> str:
        """Say which shapes the first misfit has."""
        name = min(self.misfits)
        there = list(self.source.meta[released_name(name)].shape)
        return f"{name} is {there} there and {list(self.shapes[name])} here"

    def read(self, name: str) -> Tensor:
        """Return a tensor by our name, whole, in Megatron's order.

        Where nothing but the order of rows changes, it is a view of the source: Q, K and V of each head stand in the
        axes [heads, 3, head width, ...], so that a slice of the heads reads no others.
        """
        tensor = self.source.read(released_name(name))
        if is_fused(name):
            return split_heads(tensor, self.heads[name.partition(".")[0]])
        resize = _resizer(name, tensor.shape, self.shapes[name])
        return tensor if resize is None else resize(tensor)

    def rows(self) -> list[list[str]]:
        """Return the table's rows: what happened, how many tensors, which."""
        kinds = {
            "loaded": self.loaded, "resized": self.resized, "missing": self.missing, "unexpected": self.surplus
        }  # fmt: skip
        return [
            [kind, str(len(names)), summary(names) if kind in ("loaded", "unexpected") else ", ".join(names)]
            for kind, names in kinds.items()
        ]


def fit(source: Released, shapes: Mapping[str, Shape], heads: Mapping[str, int]) -> Fit:
    """Match a checkpoint to a model.

    Args:
        source: the checkpoint.
        shapes: whole shapes of the model's tensors by our names.
        heads: attention heads by tower, `vision` and `text`.
    """
    result = Fit(source, shapes, heads)
    for name, shape in shapes.items():
        held = source.meta.get(released_name(name))
        if held is None:
            result.missing.append(name)
        elif tuple(held.shape) == shape:
            result.loaded.append(name)
        elif _resizer(name, held.shape, shape) is not None:
            result.resized.append(name)
        else:
            result.misfits.append(name)
    used = {released_name(name) for name in shapes}
    result.unexpected.extend(name for name in source.meta if name not in used and not _is_empty(source, name))
    return result


def refuse_gaps(fitted: Fit, allowed: Sequence[str], model: str) -> None:
    """Refuse misfits, and missing and unexpected tensors that no pattern of `allowed` names, here or in the file.

    Raises:
        CheckpointError: with the first of them and how to allow it.
    """
    if fitted.misfits:
        raise CheckpointError(
            f"{fitted.source.path} does not hold the model {model}: {fitted.misfit()}{hint(fitted.source)}; "
            "choose the model that it holds"
        )
    unexpected = {name: fitted.source.origin(name) for name in fitted.unexpected}
    for kind, names in (("missing", {name: name for name in fitted.missing}), ("unexpected", unexpected)):
        rest = [
            origin
            for name, origin in names.items()
            if not any(fnmatch(name, pattern) or fnmatch(origin, pattern) for pattern in allowed)
        ]
        if rest:
            raise CheckpointError(
                f"{fitted.source.path} does not hold the model {model}: {len(rest)} tensors are {kind}, such as "
                f"{rest[0]}{hint(fitted.source)}; choose the model that it holds, or allow them by name"
            )


_IN_LAYER = re.compile(r"blocks\.|\blayers\.\d")


def summary(names: Sequence[str]) -> str:
    """Names in a line: those outside of the layers, and the number of those inside."""
    layers = [name for name in names if _IN_LAYER.search(name)]
    others = [name for name in names if not _IN_LAYER.search(name)]
    return ", ".join(others + ([f"{len(layers)} tensors in the layers"] if layers else []))


def _resizer(name: str, old: Sequence[int], new: Shape) -> Callable[[Tensor], Tensor] | None:
    """The function that makes a tensor of shape `new` out of another one of shape `old`, if there is one."""
    if tuple(old) == new or len(old) != len(new):
        return None
    if name == "vision.pos_embed" and old[2] == new[2]:
        classes = next((count for count in (1, 0) if _is_square(old[1] - count) and _is_square(new[1] - count)), None)
        side = math.isqrt(new[1] - (classes or 0))
        return None if classes is None else partial(_resize_positions, side=side, class_tokens=classes)
    if name == "vision.patch_embed.weight" and tuple(old[:2]) == new[:2]:
        return partial(_resize_patch_kernel, size=new[2])
    if name == "text.positional_embedding" and old[1] == new[1] and old[0] > new[0]:
        return lambda positions: positions[: new[0]]  # exact, as a token sees only those before it
    return None


def _resize_positions(positions: Tensor, *, side: int, class_tokens: int) -> Tensor:
    """Interpolate positions [1, class tokens + patches, width] bicubically for side * side patches."""
    from timm.layers import resample_abs_pos_embed  # seconds, for what few runs need

    return resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=class_tokens, interpolation="bicubic")


def _resize_patch_kernel(kernel: Tensor, *, size: int) -> Tensor:
    """Resample the patch embedding's kernel [width, 3, old, old] for patches of `size` pixels.

    By the pseudo-inverse of the bicubic resize (Beyer et al. 2023, FlexiViT, section 3.4), which keeps the embedding
    of an enlarged image what it was. The released code resizes the kernel itself, which scales its output by the
    number of pixels.
    """
    from timm.layers import resample_patch_embed

    return resample_patch_embed(kernel, [size, size], interpolation="bicubic")


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _is_empty(source: Released, name: str) -> bool:
    """Whether a bias is all zeros, and so says nothing: timm's heads always have one."""
    return name == HEAD_BIAS and not bool(torch.any(source.read(name)))


def hint(source: Released) -> str:
    """Say what a checkpoint is that does not fit a model, and what can be done with it; empty where that is unknown."""
    if source.has_pool:
        return " (it is a SigLIP: model=vit_b_16_siglip is one, model.vision.kind=siglip; its text tower stays out)"
    if any(".attn_pool." in name or ".attnpool." in name for name in source.meta):
        return " (it pools by attention, as CoCa and OpenAI's ResNets: use it as a teacher)"
    if NORM_PRE in source.meta:
        return " (it is a ViT of OpenAI's and open_clip's kind: model=vit_b_16 is one, model.vision.kind=clip)"
    if source.format == "hf":
        return " (it is a model of transformers: use its folder as a teacher, hf:FOLDER)"
    if any("q_proj" in name for name in source.meta):
        return " (it is an EVA02-B or -L, with rotary positions: use it as a teacher)"
    return ""
