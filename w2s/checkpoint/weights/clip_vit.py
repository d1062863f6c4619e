"""The names and shapes of OpenAI's and open_clip's own vision transformer, and the released ones, which are timm's too.

Source of the names: openai/CLIP, clip/model.py; mlfoundations/open_clip, src/open_clip/transformer.py.
"""

from torch import Tensor

MARK = "visual.class_embedding"
"""A tensor that such a tower has and no other."""
RELEASED_MARK = "visual.norm_pre.weight"
"""What of it no other has under the released names: the norm before the layers."""

_NAMES = {
    "conv1.": "patch_embed.proj.",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_PROJECTION = "visual.proj", "visual.head.weight"


def released_from(name: str) -> str:
    """Return the released name of a tensor of such a tower; other names stay."""
    if name == _PROJECTION[0]:
        return _PROJECTION[1]
    return _renamed(name, _NAMES)


def name_from(released: str) -> str:
    """Return the name that open_clip has for a released one, the inverse of `released_from`."""
    if released == _PROJECTION[1]:
        return _PROJECTION[0]
    return _renamed(released, {theirs: ours for ours, theirs in _NAMES.items()})


def to_released(released: str, tensor: Tensor) -> Tensor:
    """Give a tensor the shape that it has under its released name: [1, 1, w], [1, tokens, w], [embed, w]."""
    match released:
        case "visual.cls_token":
            return tensor[None, None]
        case "visual.pos_embed":
            return tensor[None]
        case "visual.head.weight":
            return tensor.T
    return tensor


def from_released(released: str, tensor: Tensor) -> Tensor:
    """Give a released tensor the shape that open_clip has, the inverse of `to_released`."""
    match released:
        case "visual.cls_token":
            return tensor[0, 0]
        case "visual.pos_embed":
            return tensor[0]
        case "visual.head.weight":
            return tensor.T
    return tensor


def _renamed(name: str, parts: dict[str, str]) -> str:
    if name.startswith("visual."):
        for old, new in parts.items():
            name = name.replace(old, new)
    return name
