"""How other programs name and lay out a CLIP's tensors: as tables beside the released names, and read by these.

| written by                                | names there                                             |
|-------------------------------------------|---------------------------------------------------------|
| EVA-CLIP (`CustomCLIP`)                   | `visual.…`, `text.…`, `logit_scale`: the released names |
| EVA's masked stage, timm                  | the vision tower's, without a prefix                    |
| open_clip, with a vision tower of timm's  | `visual.trunk.…`, and text with or without `text.`      |
| open_clip and OpenAI, with their own ViT  | `visual.conv1.…`, and text with or without `text.`      |
| transformers: CLIP, SigLIP, EVA-CLIP, or  | `vision_model.…` and `text_model.…`, where Q, K and V   |
| a CLIP around a vision tower of timm's    | are apart, and projections beside them                  |

Sources of the names: openai/CLIP, clip/model.py, and mlfoundations/open_clip, src/open_clip/transformer.py;
transformers, models/clip and models/siglip; EVA-CLIP-8B, modeling_evaclip.py, which comes with the weights and is never
run.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from w2s.checkpoint.weights.eva_format import HEAD, HEAD_BIAS, POOL, translate
from w2s.checkpoint.weights.views import Source, zeros_for

Words = Mapping[str, str]
"""Parts of another program's names by tower, and the released ones."""

OPEN_CLIP_VISION: Words = {
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
"""OpenAI's and open_clip's own vision transformer; the projection, `visual.proj`, is transposed there."""
TRANSFORMERS_VISION: Words = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "pre_layrnorm.": "norm_pre.",
    "post_layernorm.": "norm.",
    "encoder.layers.": "blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.qkv.": ".attn.qkv.",
    ".self_attn.out_proj.": ".attn.proj.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.attention.in_proj_": "attn_pool.qkv.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
}
"""The vision towers of CLIP, EVA-CLIP and SigLIP in transformers; `self_attn.qkv` stands for Q, K and V."""
TRANSFORMERS_TEXT: Words = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.qkv.": ".attn.in_proj_",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
"""CLIP's text tower there."""

_WRAPPING = ("module.", "_orig_mod.", "model.", "timm_model.")
"""Prefixes that data parallelism, `torch.compile` and transformers put before every name."""
_BUFFERS = re.compile(
    r"(^|\.)(attn_mask|input_resolution|context_length|vocab_size|position_ids|rope\.freqs_(cos|sin)|k_bias)$"
)
"""What is not a weight: it follows from the shape of the model."""
_PLAIN_TEXT = ("token_embedding.", "positional_embedding", "transformer.resblocks.", "ln_final.", "text_projection")
"""Where the text tower of a CLIP without the prefix `text.` begins."""
_TRANSFORMERS = ("vision_model.", "text_model.", "embeddings.patch_embeddings.")
"""How names begin in the CLIPs, SigLIPs and DINOv2s of transformers."""
_OPEN_CLIP_MARK = "visual.class_embedding"
_SIGLIP_MARK = "head.attention.in_proj_weight"
_EVA_CLIP_MARKS = {
    f"vision_model.embeddings.{name}"
    for name in ("class_embedding", "patch_embedding.bias", "position_embedding.weight")
}
"""CLIP's patches have no bias, and SigLIP has no class token."""
_CLIP_MARKS = {"text_model.embeddings.token_embedding.weight", "text_projection.weight", "visual_projection.weight"}
_VISION_PREFIX = re.compile(
    r"(vision_model\.)*(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.|head\.(probe|attention|layernorm|mlp))"
)
_TEXT_PREFIX = re.compile(r"(text_model\.)+")
"""transformers 4 names the towers inside of the towers."""
_QKV = re.compile(r"self_attn\.([qkv])_proj\.")


def inverse(words: Words) -> Words:
    """Return the table from released names."""
    return {released: theirs for theirs, released in words.items()}


def expand(name: str, tensor: Tensor) -> Tensor:
    """Give a class token [width] or positions [tokens, width] the released shape, with leading axes of length 1."""
    match name:
        case "visual.cls_token":
            return tensor[None, None]
        case "visual.pos_embed":
            return tensor[None]
    return tensor


def contract(name: str, tensor: Tensor) -> Tensor:
    """Give a released class token and positions the shapes that they have elsewhere, the inverse of `expand`."""
    match name:
        case "visual.cls_token":
            return tensor[0, 0]
        case "visual.pos_embed":
            return tensor[0]
    return tensor


def sources_of(names: Iterable[str]) -> tuple[str, dict[str, Source]]:
    """Return who wrote tensors (see `Released.format`), and what the released ones are made of."""
    bare = _unwrapped(names)
    kind = _kind(bare)
    parts: dict[str, list[str]] = {}
    for name in sorted(bare, key=_position):
        new = _released(name, kind)
        if not _BUFFERS.search(name):
            parts[new] = [*(parts.get(new, []) if _QKV.search(name) else []), name]
    sources = {new: Source(tuple(bare[name] for name in of), _maker(new, kind)) for new, of in parts.items()}
    if kind == "siglip":
        sources |= _parts_of_pool(sources)
    if kind == "timm":  # its projection has no bias, as one of zeros
        sources[HEAD_BIAS] = zeros_for(bare["visual_projection.weight"])
    return "eva" if kind == "eva" else _format_of(bare), sources


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names by what is left of them without the prefixes that all have."""
    bare = {name: name for name in names}
    prefix = next((start for start in _WRAPPING if bare and all(name.startswith(start) for name in bare)), "")
    rest = _unwrapped(name.removeprefix(prefix) for name in bare) if prefix else bare
    return {name: f"{prefix}{origin}" for name, origin in rest.items()}


def _kind(names: Mapping[str, str]) -> str:
    """Which tables a CLIP is read by: `eva`, `siglip`, `clip` or `timm` of transformers, `open_clip`, or none."""
    if names.keys() >= _EVA_CLIP_MARKS and "vision_model.pre_layrnorm.weight" not in names:
        return "eva"
    if _SIGLIP_MARK in {name.removeprefix("vision_model.") for name in names}:
        return "siglip"
    if {_TEXT_PREFIX.sub("text_model.", name) for name in names} >= _CLIP_MARKS:
        return "clip" if any(".embeddings.patch_embedding." in name for name in names) else "timm"
    return "open_clip" if _OPEN_CLIP_MARK in names else ""


def _released(name: str, kind: str) -> str:
    """The released name of what another program calls `name`."""
    if kind in ("eva", "siglip", "clip") and _VISION_PREFIX.match(name):
        inside = _VISION_PREFIX.sub("", name, count=1)
        if kind == "eva":  # the biases of Q and V stay apart
            inside = re.sub(r"self_attn\.([qkv])_proj\.bias", r"attn.\1_bias", inside)
        return f"visual.{translate(_QKV.sub('self_attn.qkv.', inside), TRANSFORMERS_VISION)}"
    if kind == "timm" and name.startswith("vision_model."):
        return f"visual.{name.removeprefix('vision_model.').removeprefix('timm_model.')}"
    if kind in ("eva", "clip", "timm"):
        if name.startswith("text_model."):
            inside = _QKV.sub("self_attn.qkv.", _TEXT_PREFIX.sub("", name, count=1))
            return f"text.{translate(inside, TRANSFORMERS_TEXT)}"
        name = {"text_projection.weight": "text.text_projection"}.get(name, name)
        return name.replace("visual_projection.", "visual.head.")
    name = name.replace("visual.trunk.", "visual.").replace("visual.head.proj.", "visual.head.")
    if kind == "open_clip" and name.startswith("visual."):
        return HEAD if name == "visual.proj" else translate(name, OPEN_CLIP_VISION)
    if name.startswith(("visual.", "text.")) or name in ("logit_scale", "logit_bias"):
        return name
    return f"text.{name}" if name.startswith((*_PLAIN_TEXT, "text_model.")) else f"visual.{name}"


def _position(name: str) -> int:
    """Q before K before V; the order of all others does not matter."""
    part = _QKV.search(name)
    return "qkv".index(part[1]) if part else 0


def _maker(name: str, kind: str) -> Callable[..., Tensor]:
    """What makes the released tensor `name` of its parts."""
    transposed = HEAD if kind == "open_clip" else "text.text_projection"

    def make(*parts: Tensor) -> Tensor:
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if kind not in ("", "timm"):
            tensor = expand(name, tensor)
        return tensor.T if kind and name == transposed else tensor

    return make


def _parts_of_pool(sources: dict[str, Source]) -> dict[str, Source]:
    """Of the rows of Q, K and V of SigLIP's pool: the first third, and the rest."""
    parts = {}
    for kind in ("weight", "bias"):
        names = sources.pop(f"{POOL}qkv.{kind}").names
        parts[f"{POOL}q.{kind}"] = Source(names, lambda rows: rows[: len(rows) // 3])
        parts[f"{POOL}kv.{kind}"] = Source(names, lambda rows: rows[len(rows) // 3 :])
    return parts


def _format_of(names: Mapping[str, str]) -> str:
    prefixed = any(name.startswith(("visual.", "text.")) for name in names)
    if any(name.startswith(_TRANSFORMERS) for name in names):
        return "hf"
    if "mask_token" in names or "lm_head.weight" in names:
        return "mim"
    if any(name.startswith("visual.trunk.") for name in names) or _OPEN_CLIP_MARK in names:
        return "open_clip"
    if any(name.startswith(_PLAIN_TEXT) for name in names):
        return "open_clip" if prefixed else "text"
    return "eva" if prefixed else "timm"
