"""A SigLIP that transformers saved, its vision tower under timm's names, which are the released ones.

Q, K and V of a layer are three tensors there, and those of the pool one, of which timm keeps Q apart.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from w2s.checkpoint.weights.joined import Joined
from w2s.checkpoint.weights.tensor_files import Tensors

_TOWER = re.compile(
    r"^(vision_model\.)*(?=embeddings\.|encoder\.|post_layernorm\.|head\.(probe|attention|layernorm|mlp))"
)
_FUSED = re.compile(r"self_attn\.[qkv]_proj\.(weight|bias)$")
_NAMES = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.position_embedding.weight": "pos_embed",
    "encoder.layers.": "blocks.",
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "post_layernorm": "norm",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj": "attn_pool.proj",
    "head.attention.": "attn_pool.",
    "head.layernorm": "attn_pool.norm",
    "head.mlp": "attn_pool.mlp",
}
"""timm's words for those of a SigLIP in transformers."""
_MARK = "head.attention.in_proj_weight"
"""What such a SigLIP has, and a CLIP has not."""


def is_transformers_siglip(names: Iterable[str]) -> bool:
    """Whether names are those of a SigLIP of transformers, or of its vision tower alone."""
    return any(name.removeprefix("vision_model.") == _MARK for name in names)


class TransformersSiglip(Joined):
    """The tensors of such a SigLIP; those of its text tower keep their names.

    Args:
        tensors: the checkpoint.
        names: its names, by what is left of them without what stands before all of them.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        super().__init__(tensors, names, _timm_name, _shaped)
        self._whole: dict[str, str] = {}
        for kind in ("weight", "bias"):
            whole = f"visual.attn_pool.in_proj_{kind}"
            weight = self.meta.pop(whole)
            for part in ("q", "kv"):
                name = f"visual.attn_pool.{part}.{kind}"
                self._whole[name], self.meta[name] = whole, _part(name, weight)

    def read(self, name: str) -> Tensor:
        """Return a tensor by timm's name."""
        if name in self._whole:
            return _part(name, super().read(self._whole[name]))
        return super().read(name)


def _part(name: str, weight: Tensor) -> Tensor:
    """Of the rows of Q, K and V: the first third, or the rest."""
    width = len(weight) // 3
    return weight[:width] if ".q." in name else weight[width:]


def _shaped(name: str, tensor: Tensor) -> Tensor:
    return tensor[None] if name == "visual.pos_embed" else tensor


def _timm_name(name: str) -> str:
    if not _TOWER.match(name):
        return name
    name = _FUSED.sub(r"attn.qkv.\1", _TOWER.sub("", name))
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return f"visual.{name}"
