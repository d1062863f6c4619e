"""Small models of other libraries with random weights, of shapes that w2s has too."""

from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.transformer import TextTransformer
from timm.layers import LayerNorm, RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from w2s.config.sections import ModelConfig, TextConfig, VisionConfig

EMBED = 16
TEXT = TextConfig(context_length=12, vocab_size=80, layers=2, width=32, heads=2, mlp_width=128)
KINDS: dict[str, dict[str, Any]] = {
    "18b": {"norm": "rmsnorm", "norm_placement": "post", "qkv_bias": False},
    "8b": {"norm": "rmsnorm", "norm_placement": "pre", "qkv_bias": False},
    "e": {"norm": "layernorm", "norm_placement": "post", "qkv_bias": True},
    "g": {"norm": "layernorm", "norm_placement": "pre", "qkv_bias": True},
    "siglip": {"kind": "siglip", "norm": "layernorm", "norm_placement": "pre", "qkv_bias": True},
    "vit": {"kind": "clip", "norm": "layernorm", "norm_placement": "pre", "qkv_bias": True, "mlp_width": 128},
}


def model_of(kind: str, image_size: int = 32, patch_size: int = 8) -> ModelConfig:
    """A small CLIP of EVA-18B's, EVA-8B's, EVA02-E's, EVA01-g's, SigLIP's or open_clip's own kind."""
    shape = {"mlp_width": 64, **KINDS[kind]}
    vision = VisionConfig(image_size=image_size, patch_size=patch_size, layers=2, width=32, heads=2, **shape)
    embed_dim = vision.width if vision.kind == "siglip" else EMBED
    return ModelConfig(name=f"small-{kind}", embed_dim=embed_dim, vision=vision, text=TEXT)


def stir(module: nn.Module, seed: int) -> None:
    """Draw every parameter, norms and biases too, and leave training mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.15)
    module.eval()


def timm_tower(model: ModelConfig, seed: int = 0) -> Eva | VisionTransformer:
    """timm's Eva, or its ViT, with a norm before the layers or SigLIP's; its head has a bias only where ours has."""
    vision = model.vision
    norm = RmsNorm if vision.norm == "rmsnorm" else LayerNorm
    shape: dict[str, Any] = {
        "img_size": vision.image_size, "patch_size": vision.patch_size, "embed_dim": vision.width,
        "depth": vision.layers, "num_heads": vision.heads, "mlp_ratio": vision.mlp_width / vision.width,
        "qkv_bias": vision.qkv_bias, "num_classes": model.embed_dim, "global_pool": "token",
    }  # fmt: skip
    if vision.kind == "siglip":
        shape |= {"class_token": False, "global_pool": "map", "num_classes": 0, "act_layer": vision.activation}
        tower = VisionTransformer(**shape)
    elif vision.kind == "clip":
        tower = VisionTransformer(
            pre_norm=True, norm_layer=partial(norm, eps=1e-5), act_layer=vision.activation, **shape
        )
    else:
        post = vision.norm_placement == "post"
        tower = Eva(use_post_norm=post, norm_layer=partial(norm, eps=1e-6), **shape)
    if vision.class_tokens and not vision.head_bias:
        tower.head.bias = None
    stir(tower, seed)
    return tower


def text_tower(model: ModelConfig, seed: int = 1) -> TextTransformer:
    """open_clip's text transformer, which is EVA-CLIP's too."""
    text = model.text
    tower = TextTransformer(
        context_length=text.context_length, vocab_size=text.vocab_size, width=text.width, heads=text.heads,
        layers=text.layers, mlp_ratio=text.mlp_width / text.width, output_dim=model.embed_dim,
    )  # fmt: skip
    stir(tower, seed)
    return tower


def released(model: ModelConfig) -> dict[str, Tensor]:
    """A CLIP under the released EVA-CLIP names."""
    vision = {f"visual.{name}": value for name, value in timm_tower(model).state_dict().items()}
    text = {f"text.{name}": value for name, value in text_tower(model).state_dict().items()}
    return {**vision, **text, "logit_scale": torch.tensor(2.5)}


def masked_stage() -> dict[str, Tensor]:
    """What a masked student of a teacher of width 24 has beside its tower."""
    return {"mask_token": torch.randn(1, 1, 32), "lm_head.weight": torch.randn(24, 32), "lm_head.bias": torch.ones(24)}


def captions(model: ModelConfig, count: int = 5) -> Tensor:
    """Tokens [count, context length], the end token at different places."""
    text, generator = model.text, torch.Generator().manual_seed(3)
    tokens = torch.randint(1, text.vocab_size - 2, (count, text.context_length), generator=generator)
    tokens[torch.arange(count), torch.arange(count) + 4] = text.vocab_size - 1
    return tokens


def images(model: ModelConfig, count: int = 3) -> Tensor:
    size = model.vision.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(4))


def open_clip_config(model: ModelConfig) -> dict[str, Any]:
    """open_clip's own ViT beside a text tower of ours."""
    text = model.text
    return {
        "embed_dim": model.embed_dim,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
        "text_cfg": {
            "context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.layers,
        },
    }  # fmt: skip


def open_clip_model(model: ModelConfig) -> open_clip.CLIP:
    clip = open_clip.CLIP(**open_clip_config(model))
    stir(clip, 5)
    return clip
