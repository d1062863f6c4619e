"""The key names and tensor layouts of the released EVA-CLIP checkpoints, and ours.

Source of the names: baaivision/EVA, EVA-CLIP-18B/shinji/eva_clip. Ours are global: `blocks.7.mlp.linear_fc1.weight`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

VISION_NAMES = {
    "patch_embed": "patch_embed.proj",
    "self_attention.linear_qkv.weight": "attn.qkv.weight",
    "self_attention.linear_qkv.q_bias": "attn.q_bias",
    "self_attention.linear_qkv.v_bias": "attn.v_bias",
    "self_attention.linear_qkv.bias": "attn.qkv.bias",
    "self_attention.linear_proj": "attn.proj",
    "mlp.linear_fc": "mlp.fc",
    "self_attn_bda.norm": "norm1",
    "mlp_bda.norm": "norm2",
    "pre_mlp_layernorm": "norm2",
    "input_layernorm": "norm1",
    **{f"head.{part}": f"attn_pool.{part}" for part in ("latent", "q.", "kv.", "proj.", "norm.", "mlp.")},
}
"""Those of SigLIP's pool are timm's; a projection of the class token is `head` on both sides."""

TEXT_NAMES = {
    "blocks.": "transformer.resblocks.",
    "token_embedding": "token_embedding.weight",
    "self_attention.linear_qkv.weight": "attn.in_proj_weight",
    "self_attention.linear_qkv.bias": "attn.in_proj_bias",
    "self_attention.linear_proj": "attn.out_proj",
    "pre_mlp_layernorm": "ln_2",
    "input_layernorm": "ln_1",
    "mlp.linear_fc1": "mlp.c_fc",
    "mlp.linear_fc2": "mlp.c_proj",
}


TOWERS: Mapping[str, tuple[str, Mapping[str, str]]] = {"vision": ("visual", VISION_NAMES), "text": ("text", TEXT_NAMES)}
"""Our towers: the released prefix and the table of names."""


HEAD, HEAD_BIAS = "visual.head.weight", "visual.head.bias"
"""Released names of the projection of a vision tower."""
NORM_PRE = "visual.norm_pre.weight"
"""What a vision transformer of OpenAI's and open_clip's kind has, and no other: a norm before the layers."""
POOL = "visual.attn_pool."
"""How the names of SigLIP's pool begin, which is to such a tower what the projection is to others."""


def released_name(name: str) -> str:
    """Return the released name of a tensor of our checkpoints.

    `vision.blocks.layers.7.mlp.linear_fc1.weight` is `visual.blocks.7.mlp.fc1.weight` there.
    """
    if name in ("text.logit_scale", "text.logit_bias"):
        return name.removeprefix("text.")
    tower, _, rest = name.partition(".")
    prefix, names = TOWERS[tower]
    return f"{prefix}.{translate(rest.replace('blocks.layers.', 'blocks.', 1), names)}"


def translate(name: str, words: Mapping[str, str]) -> str:
    """Replace parts of a name, all at once."""
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], name)


def is_fused(name: str) -> bool:
    """Whether our parameter `name` holds Q, K and V together."""
    return re.search(r"linear_qkv\.(weight|bias)$", name) is not None


def split_heads(weight: Tensor, heads: int) -> Tensor:
    """View rows (q | k | v), each in heads, in Megatron's order: [heads, 3, head width, ...]."""
    return weight.unflatten(0, (3, heads, -1)).transpose(0, 1)


def separate(weight: Tensor, heads: int) -> Tensor:
    """Reorder Megatron's rows to (q | k | v), each in heads, as the released names have them."""
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
