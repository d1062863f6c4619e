"""A CLIP that transformers saved, under open_clip's names.

It is a `VisionTextDualEncoderModel` with a vision tower of timm's, or a `CLIPModel`. Q, K and V of a layer are three
tensors there, and the projections are linears, whose weights open_clip has transposed.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from w2s.checkpoint.weights.joined import Joined
from w2s.checkpoint.weights.tensor_files import Tensors

_TOWERS = (
    (r"^text_model\.(text_model\.)?", "text."),
    (r"^vision_model\.(vision_model\.)?(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", "visual."),
    (r"^vision_model\.(timm_model\.)?", "visual.trunk."),
)
_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}
"""open_clip's words for those of a CLIP in transformers."""
_FUSED = re.compile(r"self_attn\.[qkv]_proj\.(weight|bias)$")
_HEAD, _HEAD_BIAS = "visual.head.proj.weight", "visual.head.proj.bias"
_TRANSPOSED = ("text.text_projection", "visual.proj")
_MARKS = ("text_model.embeddings.token_embedding.weight", "text_projection.weight", "visual_projection.weight")
"""What such a CLIP has, and a SigLIP has not."""


def is_transformers_clip(names: Iterable[str]) -> bool:
    """Whether names are those of a CLIP of transformers, without what may stand before all of them."""
    renamed = {name.replace("text_model.text_model.", "text_model.", 1) for name in names}
    return renamed.issuperset(_MARKS)


class TransformersClip(Joined):
    """The tensors of such a CLIP, in open_clip's layout.

    Args:
        tensors: the checkpoint.
        names: its names, by what is left of them without what stands before all of them.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        of_timm = not any(".embeddings.patch_embedding." in name for name in names)
        super().__init__(tensors, names, partial(_open_clip_name, of_timm=of_timm), _shaped)
        if of_timm:  # its projection has no bias, as one of zeros
            head = self.meta[_HEAD]
            self.meta[_HEAD_BIAS] = torch.empty(head.shape[0], dtype=head.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Return a tensor by open_clip's name."""
        if name == _HEAD_BIAS:
            return torch.zeros_like(self.meta[name], device="cpu")
        return super().read(name)


def _shaped(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name in _TRANSPOSED else tensor


def _open_clip_name(name: str, of_timm: bool) -> str:
    if name == "visual_projection.weight":
        return _HEAD if of_timm else "visual.proj"
    if name == "text_projection.weight":
        return "text.text_projection"
    for pattern, tower in _TOWERS:
        name = re.sub(pattern, tower, name)
    if name.startswith("visual.trunk."):
        return name
    name = _FUSED.sub(r"attn.in_proj_\1", name)
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name
