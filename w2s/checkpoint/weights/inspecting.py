"""`w2s inspect`: what a checkpoint is, ours or another's, from its names and shapes alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path

from w2s.checkpoint.own.checkpoint_folders import Meta, read_meta
from w2s.checkpoint.weights.eva_format import NORM_PRE, POOL
from w2s.checkpoint.weights.released import Released, open_released
from w2s.config.load import model_from, read_document
from w2s.config.sections import ModelConfig
from w2s.megatron.checkpoint.tensor_store import has_average

FORMATS = {
    "eva": "EVA-CLIP's released names",
    "mim": "EVA's masked stage",
    "open_clip": "open_clip",
    "timm": "timm",
    "text": "a text tower alone",
    "hf": "transformers",
    "w2s": "w2s checkpoint",
}
VISION_OF_OURS = {"visual.pos_embed", "visual.patch_embed.proj.weight", "visual.blocks.0.mlp.fc1.weight"}
"""What every vision tower of w2s's kinds has."""
BIASED = {
    "eva": "Q and V",
    "clip": "Q, K and V and a norm before the layers",
    "siglip": "Q, K and V and no class token",
}
"""What tells a kind of vision tower, in words."""


def inspect(path: Path) -> dict[str, str]:
    """Return what is known of a checkpoint: a folder of ours, a weights file, an index or a folder of weights.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    released = open_released(path)
    about = {"format": FORMATS[released.format]}
    if released.format == "w2s":
        about |= _of_run(read_meta(path)) | {"weights": "last, ema" if has_average(path) else "last"}
    else:
        about["model"] = ", ".join(known_models(released)) or "none of configs/model"
    return about | _sizes(released) | _towers(released)


def known_models(released: Released) -> list[str]:
    """Return the models of configs/model whose shapes a checkpoint has; pre- and post-norm towers look alike."""
    sizes = dimensions(released)
    if released.has("visual") and "vision.width" not in sizes:
        return []
    names = sorted(path.name.removesuffix(".yaml") for path in (files("w2s.configs") / "model").iterdir())
    models = {name: model_from(read_document("model", name)) for name in names}
    return [name for name, model in models.items() if sizes and sizes.items() <= _dimensions_of(model).items()]


def dimensions(released: Released) -> dict[str, int | str | bool]:
    """Return the sizes of the towers of our kind that a checkpoint holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in released.meta.items()}
    sizes: dict[str, int | str | bool] = {}
    if shapes.keys() >= VISION_OF_OURS and len(shapes["visual.pos_embed"]) == 3 and not _is_plain_vit(shapes):
        patch, kind = shapes["visual.patch_embed.proj.weight"][-1], _kind(shapes)
        sizes |= {
            "vision.kind": kind,
            "vision.width": shapes["visual.pos_embed"][2],
            "vision.patch_size": patch,
            "vision.image_size": math.isqrt(shapes["visual.pos_embed"][1] - (kind != "siglip")) * patch,
            "vision.layers": _layers(shapes, r"visual\.blocks\.(\d+)\."),
            "vision.mlp_width": shapes["visual.blocks.0.mlp.fc1.weight"][0],
            "vision.norm": "layernorm" if "visual.blocks.0.norm1.bias" in shapes else "rmsnorm",
            "vision.qkv_bias": any(f"visual.blocks.0.attn.{name}" in shapes for name in ("q_bias", "qkv.bias")),
        }
    if (
        not released.has_foreign_text
        and "text.token_embedding.weight" in shapes
        and len(shapes.get("text.positional_embedding", ())) == 2
    ):
        sizes |= {
            "text.width": shapes["text.positional_embedding"][1],
            "text.context_length": shapes["text.positional_embedding"][0],
            "text.vocab_size": shapes["text.token_embedding.weight"][0],
            "text.layers": _layers(shapes, r"text\.transformer\.resblocks\.(\d+)\."),
        }
    if "text.text_projection" in shapes and "vision.width" in sizes:
        sizes["embed_dim"] = shapes["text.text_projection"][1]
    return sizes


def _dimensions_of(model: ModelConfig) -> dict[str, int | str | bool]:
    vision = {f"vision.{name}": value for name, value in vars(model.vision).items()}
    return vision | {f"text.{name}": value for name, value in vars(model.text).items()} | {"embed_dim": model.embed_dim}


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if "visual.cls_token" not in shapes:
        return "siglip"
    return "clip" if NORM_PRE in shapes else "eva"


def _is_plain_vit(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether K has a bias, as EVA's has not, and there is neither a norm before the layers nor a pool: timm's ViT.

    A masked run of a SigLIP's tower has no pool, and is known by what predicts the features.
    """
    ours = (NORM_PRE, f"{POOL}latent", "visual.lm_head.weight")
    return "visual.blocks.0.attn.qkv.bias" in shapes and not any(name in shapes for name in ours)


def _layers(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return 1 + max((int(layer[1]) for name in shapes if (layer := re.match(pattern, name))), default=-1)


def _of_run(meta: Meta) -> dict[str, str]:
    return {
        "stage": meta.stage,
        "model": meta.setting("model", "name"),
        "step": f"{meta.step:,}",
        "samples": f"{meta.samples:,}",
        "parent": meta.parent or "none",
        "MLflow run": meta.mlflow_run_id or "none",
        "versions": ", ".join(f"{package} {release}" for package, release in meta.versions.items()),
    }


def _sizes(released: Released) -> dict[str, str]:
    """Parameters in all and by tower, and their types."""
    groups: dict[str, Callable[[str], bool]] = {
        "parameters": lambda name: True,
        "of the vision tower": lambda name: name.startswith("visual."),
        "of the text tower": lambda name: name.startswith("text."),
    }
    counts = {
        group: sum(tensor.numel() for name, tensor in released.meta.items() if member(name))
        for group, member in groups.items()
    }
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in released.meta.values())
    return {
        **{group: f"{count:,}" for group, count in counts.items() if count},
        "types": ", ".join(f"{count} tensors in {kind}" for kind, count in kinds.most_common()),
    }


def _towers(released: Released) -> dict[str, str]:
    sizes = dimensions(released)
    lines = {}
    if "vision.width" in sizes:
        bias = "with" if sizes["vision.qkv_bias"] else "without"
        biased = BIASED[str(sizes["vision.kind"])]
        lines["vision tower"] = (
            f"{sizes['vision.layers']} layers x {sizes['vision.width']}, MLP {sizes['vision.mlp_width']}, "
            f"{sizes['vision.image_size']} px in patches of {sizes['vision.patch_size']}, {sizes['vision.norm']}, "
            f"{bias} a bias on {biased}"
        )
    elif released.has("visual"):
        lines["vision tower"] = "of another kind than w2s's"
    if released.has_foreign_text:
        lines["text tower"] = "of another kind than w2s's"
    if "text.width" in sizes:
        lines["text tower"] = (
            f"{sizes['text.layers']} layers x {sizes['text.width']}, {sizes['text.context_length']} tokens"
        )
    return lines
