"""The formats that `w2s export` writes: names of the tensors, and the files beside them."""

import math
from pathlib import Path
from typing import Any

from w2s.config.sections import ModelConfig, TextConfig, VisionConfig
from w2s.errors import CheckpointError
from w2s.towers.vision import MEAN, STD

TIMM_SHAPES = {
    "eva02_enormous_patch14_clip_224": (224, 14, 64, 1792, 16, 15360, "layernorm", "post", True),
    "eva_giant_patch14_clip_224": (224, 14, 40, 1408, 16, 6144, "layernorm", "pre", True),
}
"""Towers that timm and open_clip know by name: image, patch, layers, width, heads, MLP, norm, placement, bias."""


def timm_name(name: str) -> str:
    """Return timm's name of a released vision tensor."""
    return name.removeprefix("visual.")


def open_clip_name(name: str) -> str:
    """Return open_clip's name of a released tensor: the vision tower is timm's."""
    return name.replace("visual.", "visual.trunk.", 1) if name.startswith("visual.") else name


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
            "mlp_ratio": _ratio(vision.mlp_width, vision.width),
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


def open_clip_config(model: ModelConfig, tower: Path, logit_bias: bool) -> dict[str, Any]:
    """Return the open_clip_config.json of a CLIP.

    Args:
        model: the CLIP.
        tower: folder with the vision tower's config.json, used where open_clip has no name for it.
        logit_bias: whether the loss has a bias beside its scale (SigLIP).
    """
    named = named_tower(model.vision)
    return {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                "image_size": model.vision.image_size,
                "timm_model_name": named or f"local-dir:{tower}",
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": None,
            },
            "text_cfg": text_config(model.text),
            **({"init_logit_bias": -10} if logit_bias else {}),
        },
        "preprocess_cfg": {
            "size": model.vision.image_size,
            "mode": "RGB",
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def eva_config(model: ModelConfig) -> dict[str, Any]:
    """Return the model_configs/NAME.json with which the released EVA-CLIP code builds a CLIP."""
    vision = model.vision
    return {
        "embed_dim": model.embed_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": _ratio(vision.mlp_width, vision.width),
            "patch_size": vision.patch_size,
            "eva_model_name": model.name,
            "drop_path_rate": 0,
            "qkv_bias": vision.qkv_bias,
            "postnorm": vision.norm_placement == "post",
            "use_rms_norm": vision.norm == "rmsnorm",
        },
        "text_cfg": text_config(model.text),
    }


def text_config(text: TextConfig) -> dict[str, Any]:
    """Return a text tower in the words of open_clip's and EVA-CLIP's configurations."""
    config: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
    }
    if text.mlp_width != 4 * text.width:
        config["mlp_ratio"] = _ratio(text.mlp_width, text.width)
    return config


def named_tower(vision: VisionConfig) -> str | None:
    """Return the name that timm has for a tower, if it has one."""
    shape = (
        vision.image_size, vision.patch_size, vision.layers, vision.width, vision.heads, vision.mlp_width,
        vision.norm, vision.norm_placement, vision.qkv_bias,
    )  # fmt: skip
    return next((name for name, known in TIMM_SHAPES.items() if known == shape), None)


def _architecture(vision: VisionConfig) -> str:
    """The entry of timm's registry whose arguments can describe a tower."""
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


def _ratio(hidden: int, width: int) -> float:
    """The number that times `width`, rounded down, gives `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
