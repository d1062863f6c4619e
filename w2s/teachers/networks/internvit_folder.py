"""InternViT's own folders (300M and 6B, alone or in an InternVL) in transformers' modules of the same tower.

Their code comes with the folder (`modeling_intern_vit.py`) and is never run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w2s.checkpoint.weights.tensor_files import open_weights

KINDS = ("intern_vit_6b", "internvl_chat")
"""The `model_type` of their config.json, for every size."""
PREFIX = "vision_model."
"""Where an InternVL has the tower."""
SAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps", "hidden_act",
)  # fmt: skip
"""Settings that are called the same."""
NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "encoder.layers.": "encoder.layer.",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls": ".lambda_",
}


def internvit(transformers: Any, folder: Path, settings: Mapping[str, Any]) -> nn.Module:
    """The tower of a folder whose config.json has these `settings`.

    Raises:
        KeyError, RuntimeError: the folder describes or holds something else.
        CheckpointError: the weights cannot be read.
    """
    vision = settings.get("vision_config", settings)
    config = transformers.InternVLVisionConfig(
        **{key: vision[key] for key in SAME},
        image_size=[vision["image_size"]] * 2,
        patch_size=[vision["patch_size"]] * 2,
        norm_type=vision.get("norm_type", "rms_norm"),  # the first 6B does not say it
        attention_bias=vision["qkv_bias"],
        use_qk_norm=vision["qk_normalization"],
    )
    tensors = open_weights(folder)
    names = [name for name in tensors.meta if name.startswith(PREFIX)] or list(tensors.meta)
    state: dict[str, Tensor] = {}
    for name in names:
        state |= _renamed(name.removeprefix(PREFIX), tensors.read(name))
    with torch.device("meta"):
        model: nn.Module = transformers.InternVLVisionModel(config)
    model.load_state_dict(state, assign=True)
    return model


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor under the name that it has here; Q, K and V are apart here."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    fused = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", name)
    if fused is None:
        return {name: tensor}
    return {f"{fused[1]}.{part}_proj.{fused[2]}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
