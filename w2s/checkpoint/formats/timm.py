"""A vision tower for `timm.create_model("local-dir:FOLDER")`, which transformers' `AutoModel` reads too."""

from pathlib import Path
from typing import Any

from w2s.checkpoint.fit import MASKED_STAGE
from w2s.checkpoint.formats.base import (
    EMBEDS_IMAGES,
    HEAD,
    RESIZED,
    Export,
    Guide,
    Snippet,
    mlp_ratio,
    write_json,
    write_renamed,
)
from w2s.config.sections import VisionConfig
from w2s.errors import CheckpointError
from w2s.towers.vision import MEAN, STD

TIMM_SHAPES = {
    "eva02_enormous_patch14_clip_224": (224, 14, 64, 1792, 16, 15360, "layernorm", "post", True),
    "eva_giant_patch14_clip_224": (224, 14, 40, 1408, 16, 6144, "layernorm", "pre", True),
}
"""Towers that timm and open_clip know by name: image, patch, layers, width, heads, MLP, norm, placement, bias."""

TIMM = """\
import timm
tower = timm.create_model("{place}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
features = tower(transform(image)[None])"""
TRANSFORMERS = """\
from transformers import AutoImageProcessor, AutoModel
tower = AutoModel.from_pretrained("{place}")  # needs timm too
processor = AutoImageProcessor.from_pretrained("{place}")
features = tower(**processor(image, return_tensors="pt")).pooler_output  # of CLS, before the projection"""


def write(export: Export, folder: Path) -> Guide:
    """Write config.json and model.safetensors.

    Raises:
        CheckpointError: there is no vision tower, or timm has none of its kind.
    """
    released, model = export.released, export.model
    names = [name for name in released.meta if name.startswith("visual.") and not name.startswith(MASKED_STAGE)]
    if not names:
        raise CheckpointError(f"{released.path} holds no vision tower, which is all that timm has: use another format")
    write_json(folder / "config.json", timm_config(model.vision, model.embed_dim if HEAD in released.meta else 0))
    write_renamed(folder / "model.safetensors", export, names, timm_name, head_bias=True)
    snippets = [Snippet("timm", TIMM.format(place="local-dir:FOLDER"))]
    snippets += [Snippet("timm, from the hub", TIMM.format(place=f"hf-hub:{export.hub}"))] if export.hub else []
    snippets.append(Snippet("transformers", TRANSFORMERS.format(place=export.hub or "FOLDER")))
    return Guide("timm", EMBEDS_IMAGES, snippets, [RESIZED], vision_alone=True)


def timm_name(name: str) -> str:
    """Return timm's name of a released vision tensor."""
    return name.removeprefix("visual.")


def timm_config(vision: VisionConfig, features: int) -> dict[str, Any]:
    """Return the config.json with which `timm.create_model("local-dir:FOLDER")` builds a tower.

    Args:
        vision: the tower.
        features: width of its projection, 0 for none.

    Raises:
        CheckpointError: timm has no such tower.
    """
    size = vision.image_size
    return {
        "architecture": _architecture(vision),
        "num_classes": features,
        "num_features": vision.width,
        "global_pool": "token",
        "model_args": {
            "img_size": size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.width,
            "depth": vision.layers,
            "num_heads": vision.heads,
            "mlp_ratio": mlp_ratio(vision.mlp_width, vision.width),
            "qkv_bias": vision.qkv_bias,
            "class_token": True,
            "global_pool": "token",
            **({"norm_layer": "rmsnorm"} if vision.norm == "rmsnorm" else {}),
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(MEAN),
            "std": list(STD),
            "tag": "clip",
            "num_classes": features,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def named_tower(vision: VisionConfig) -> str | None:
    """Return the name that timm has for a tower of EVA's kind, if it has one."""
    if vision.kind != "eva":
        return None
    shape = (
        vision.image_size, vision.patch_size, vision.layers, vision.width, vision.heads, vision.mlp_width,
        vision.norm, vision.norm_placement, vision.qkv_bias,
    )  # fmt: skip
    return next((name for name, known in TIMM_SHAPES.items() if known == shape), None)


def _architecture(vision: VisionConfig) -> str:
    """The entry of timm's registry whose arguments can describe a tower."""
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
