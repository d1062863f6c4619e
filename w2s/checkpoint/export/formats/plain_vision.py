"""The vision tower of a CLIP as a module of timm, which needs no Megatron: for teachers, servers and peers."""

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from w2s.checkpoint.export.formats.timm import timm_name, timm_pool
from w2s.checkpoint.weights.matching import MASKED_STAGE
from w2s.checkpoint.weights.released import Released
from w2s.config.sections import ModelConfig, VisionConfig


def image_tower(model: ModelConfig, *, has_head: bool, device: torch.device | str = "meta") -> Eva | VisionTransformer:
    """timm's module for the vision tower of a CLIP, with random weights.

    Args:
        model: the CLIP.
        has_head: whether it ends in the projection into the shared space, or in SigLIP's pool.
        device: where it is made; on `meta` it has no memory for its weights.
    """
    vision = model.vision
    norm = RmsNorm if vision.norm == "rmsnorm" else LayerNorm
    build = _eva if vision.kind == "eva" else _vit
    with torch.device(device):
        tower = build(
            vision,
            img_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.width,
            depth=vision.layers,
            num_heads=vision.heads,
            mlp_ratio=(vision.mlp_width + 0.5) / vision.width,  # rounded down there
            qkv_bias=vision.qkv_bias,
            norm_layer=partial(norm, eps=vision.norm_eps),
            num_classes=model.embed_dim if has_head and vision.class_tokens else 0,
            **timm_pool(vision, has_head),
        )
    if isinstance(tower.head, nn.Linear) and not vision.head_bias:
        tower.head.register_parameter("bias", None)
    return tower


def _eva(vision: VisionConfig, **shape: Any) -> Eva:
    return Eva(use_post_norm=vision.norm_placement == "post", **shape)


def _vit(vision: VisionConfig, **shape: Any) -> VisionTransformer:
    return VisionTransformer(pre_norm=vision.norm_pre, act_layer=vision.activation, **shape)


def loaded_image_tower(released: Released, model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """Return the vision tower of a checkpoint in evaluation mode, its weights in `dtype`."""
    tower = image_tower(model, has_head=released.embeds_images)
    names = [name for name in released.meta if name.startswith("visual.") and not name.startswith(MASKED_STAGE)]
    tower.load_state_dict({timm_name(name): released.read(name).to(dtype) for name in names}, assign=True)
    zero_key_biases(tower, dtype)
    return tower.eval().requires_grad_(False)


def zero_key_biases(tower: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Give memory to what a tower of the meta device has beside its weights: zeros for the biases of K."""
    for module in tower.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros_like(buffer, device="cpu", dtype=dtype), persistent=False)
