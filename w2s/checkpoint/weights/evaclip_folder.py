"""EVA-CLIP's own folders of transformers (EVA-CLIP-8B, -8B-448, -18B) under the released names.

Their code comes with the folder (`modeling_evaclip.py`) and is never run: Q, K and V are apart there, and the text
projection is a linear layer.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from w2s.checkpoint.weights.joined import Joined
from w2s.checkpoint.weights.tensor_files import Tensors

MARKS = ("class_embedding", "patch_embedding.bias", "position_embedding.weight")
"""What together tells their vision tower from CLIP's, which has no bias, and SigLIP's, which has no class token."""
QKV = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
VISION = {
    "vision_model.embeddings.class_embedding": "visual.cls_token",
    "vision_model.embeddings.position_embedding.weight": "visual.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual.patch_embed.proj",
    "vision_model.encoder.layers.": "visual.blocks.",
    "vision_model.post_layernorm": "visual.norm",
    "visual_projection": "visual.head",
    "self_attn.out_proj": "attn.proj",
    "layer_norm": "norm",
}
TEXT = {
    "text_model.embeddings.token_embedding": "text.token_embedding",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_model.final_layer_norm": "text.ln_final",
    "text_projection.weight": "text.text_projection",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def is_evaclip(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as in such a folder."""
    embeddings = all(f"vision_model.embeddings.{name}" in names for name in MARKS)
    return embeddings and "vision_model.pre_layrnorm.weight" not in names


def evaclip_tensors(tensors: Tensors) -> Joined:
    """Return the tensors of such a folder by released name."""
    names = {name: name for name in tensors.meta if not name.endswith("position_ids")}
    return Joined(tensors, names, _released, _shaped)


def _released(name: str) -> str:
    match = QKV.fullmatch(name)
    if match:
        tower, layer, part, kind = match.groups()
        if tower == "text":
            return f"text.transformer.resblocks.{layer}.attn.in_proj_{kind}"
        own = {("q", "bias"): "q_bias", ("v", "bias"): "v_bias", ("k", "bias"): "k_proj.bias"}  # EVA's K has none
        return f"visual.blocks.{layer}.attn.{own.get((part, kind), 'qkv.weight')}"
    for theirs, ours in (TEXT if name.startswith("text_") else VISION).items():
        name = name.replace(theirs, ours)
    return name


def _shaped(name: str, tensor: Tensor) -> Tensor:
    if name == "text.text_projection":
        return tensor.T
    return {"visual.cls_token": tensor[None, None], "visual.pos_embed": tensor[None]}.get(name, tensor)
