"""A vision tower for `timm.create_model("local-dir:FOLDER")`, which transformers' `AutoModel` reads too."""

from pathlib import Path
from typing import Any

from w2s.checkpoint.export.formats.base import (
    EMBEDS_IMAGES,
    RESIZED,
    Export,
    Guide,
    Snippet,
    mlp_ratio,
    write_json,
    write_weights,
)
from w2s.checkpoint.weights.eva_format import HEAD, HEAD_BIAS
from w2s.checkpoint.weights.matching import MASKED_STAGE
from w2s.checkpoint.weights.views import renamed, zeros_for
from w2s.config.sections import VisionConfig
from w2s.errors import CheckpointError
from w2s.towers.vision import channel_statistics

TIMM_SHAPES = {
    "eva02_enormous_patch14_clip_224": (224, 14, 64, 1792, 16, 15360, "layernorm", "post", True),
    "eva_giant_patch14_clip_224": (224, 14, 40, 1408, 16, 6144, "layernorm", "pre", True),
}
"""Towers that timm and open_clip know by name: image, patch, layers, width, heads, MLP, norm, placement, bias."""
SIGLIP_SIZES = {
    "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096), "so400m": (27, 1152, 16, 4304),
}  # fmt: skip
"""SigLIP's: layers, width, heads, MLP."""
SIGLIPS = (
    "base_patch16_siglip_224", "base_patch16_siglip_256", "base_patch16_siglip_384", "base_patch16_siglip_512",
    "large_patch16_siglip_256", "large_patch16_siglip_384", "so400m_patch14_siglip_224", "so400m_patch14_siglip_378",
)  # fmt: skip
"""Those that timm and open_clip know by name with the exact GELU."""

TIMM = """\
import timm
tower = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
features = tower(transform(image)[None])"""
TRANSFORMERS = """\
from transformers import AutoImageProcessor, AutoModel
tower = AutoModel.from_pretrained("{place}")  # needs timm too
processor = AutoImageProcessor.from_pretrained("{place}")
features = tower(**processor(image, return_tensors="pt")).pooler_output  # {what}"""


def write(export: Export, folder: Path) -> Guide:
    """Write config.json and model.safetensors.

    Raises:
        CheckpointError: there is no vision tower, or timm has none of its kind.
    """
    released, model = export.released, export.model
    names = [name for name in released.meta if name.startswith("visual.") and not name.startswith(MASKED_STAGE)]
    if not names:
        raise CheckpointError(f"{released.path} holds no vision tower, which is all that timm has: use another format")
    features = model.embed_dim if HEAD in released.meta else 0
    write_json(folder / "config.json", timm_config(model.vision, features, has_pool=released.embeds_images))
    sources = {timm_name(name): renamed(name) for name in names}
    if HEAD in released.meta:
        sources.setdefault(timm_name(HEAD_BIAS), zeros_for(HEAD))  # timm's head has one
    write_weights(folder / "model.safetensors", export, sources)
    snippets = [Snippet("timm", TIMM.format(place="local-dir:FOLDER"))]
    snippets += [Snippet("timm, from the hub", TIMM.format(place=f"hf-hub:{export.hub}"))] if export.hub else []
    snippets.append(
        Snippet(
            "transformers",
            TRANSFORMERS.format(place=export.hub or "FOLDER", what=_summary(model.vision, released.embeds_images)),
        )
    )
    return Guide("timm", EMBEDS_IMAGES, snippets, [RESIZED], vision_alone=True)


def _summary(vision: VisionConfig, has_pool: bool) -> str:
    """Say what timm makes of the tokens of an image, up to the projection."""
    if vision.class_tokens:
        return "of CLS, before the projection"
    return "of all tokens, pooled by attention" if has_pool else "of all tokens, their mean"


def timm_name(name: str) -> str:
    """Return timm's name of a released vision tensor."""
    return name.removeprefix("visual.")


def timm_config(vision: VisionConfig, features: int, has_pool: bool = True) -> dict[str, Any]:
    """Return the config.json with which `timm.create_model("local-dir:FOLDER")` builds a tower.

    Args:
        vision: the tower.
        features: width of its projection, 0 for none.
        has_pool: whether a SigLIP's tower has its pool; a masked run's has none, and its tokens are averaged.

    Raises:
        CheckpointError: timm has no such tower.
    """
    size, (mean, std), pool = vision.image_size, channel_statistics(vision), timm_pool(vision, has_pool)
    return {
        "architecture": _architecture(vision),
        "num_classes": features,
        "num_features": vision.width,
        "global_pool": pool["global_pool"],
        "model_args": {
            "img_size": size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.layers,
            "num_heads": vision.heads,
            "mlp_ratio": mlp_ratio(vision.mlp_width, vision.width),
            "qkv_bias": vision.qkv_bias,
            **pool,
            **({"act_layer": vision.activation} if vision.activation == "gelu_tanh" else {}),
            **({"norm_layer": "rmsnorm"} if vision.norm == "rmsnorm" else {}),
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "tag": "clip",
            "num_classes": features,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_pool(vision: VisionConfig, has_pool: bool) -> dict[str, Any]:
    """Return how timm's module for a tower makes one vector of its tokens."""
    if vision.class_tokens:
        return {"class_token": True, "global_pool": "token"}
    # Without a pool of their own tokens are averaged after the final norm, not before it.
    return {"class_token": False, **({"global_pool": "map"} if has_pool else {"global_pool": "avg", "fc_norm": False})}


def named_tower(vision: VisionConfig) -> str | None:
    """Return the name that timm has for a tower of EVA's or SigLIP's kind, if it has one."""
    if vision.kind == "siglip":
        return _named_siglip(vision)
    shape = (
        vision.image_size, vision.patch_size, vision.layers, vision.width, vision.heads, vision.mlp_width,
        vision.norm, vision.norm_placement, vision.qkv_bias,
    )  # fmt: skip
    return next((name for name, known in TIMM_SHAPES.items() if known == shape), None)


def _named_siglip(vision: VisionConfig) -> str | None:
    shape = vision.layers, vision.width, vision.heads, vision.mlp_width, vision.activation
    size = next((name for name, known in SIGLIP_SIZES.items() if (*known, "gelu") == shape), None)
    name = f"{size}_patch{vision.patch_size}_siglip_{vision.image_size}"
    return f"vit_{name}" if name in SIGLIPS else None


def _architecture(vision: VisionConfig) -> str:
    """The entry of timm's registry whose arguments can describe a tower."""
    if vision.kind == "siglip":
        return "vit_base_patch16_siglip_224"
    if vision.kind == "clip":
        return f"vit_base_patch16_clip_{'quickgelu_' if vision.activation == 'quick_gelu' else ''}224"
    match vision.norm, vision.norm_placement, vision.qkv_bias:
        case "layernorm", "post", _:
            return "eva02_enormous_patch14_clip_224"
        case "layernorm", "pre", _:
            return "eva_giant_patch14_clip_224"
        case "rmsnorm", "post", False:
            return "vit_base_patch16_rpn_224"
        case "rmsnorm", "pre", False:
            return "vit_base_patch16_224"
    raise CheckpointError(
        "timm has no tower with model.vision.norm=rmsnorm and qkv_bias=true: export it with --format safetensors"
    )
