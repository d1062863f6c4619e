"""Vision towers of Hugging Face transformers as teachers, from a folder on disk: CLIP, SigLIP and DINOv2.

A feature is a patch token after the final norm, and after the projection where the model projects single tokens
(CLIP); SigLIP's attention pooling and DINOv2's lack of a head leave the tokens as they are. The summary is the model's
own pooled output, through the projection where it has one: `get_image_features` of a CLIP or SigLIP.
"""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from w2s.errors import CheckpointError, ConfigError, MissingPackageError
from w2s.teachers.base import Features, PatchNetwork, check_image_size
from w2s.teachers.weights import reading

CLASSES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
"""The class that holds the vision tower, by the `model_type` of a folder's config.json."""
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


class HuggingFaceTokens(PatchNetwork):
    """Patch tokens of a transformers model after its final norm, each through the projection."""

    def __init__(
        self,
        tokens: nn.Module,
        norm: nn.Module,
        projection: nn.Module,
        *,
        prefix: int,
        width: int,
        config: Any,
        image_size: int,
        normalisation: dict[str, list[float]],
        options: dict[str, Any],
    ) -> None:
        """Wrap a model.

        Args:
            tokens: gives `last_hidden_state` and `pooler_output`.
            norm: the final norm, where `last_hidden_state` lacks it.
            projection: the projection that both lack.
            prefix: tokens before the patches' (CLS, registers).
            width: channels of a feature.
            config: the configuration of the vision tower.
            image_size: side of the input in pixels.
            normalisation: the folder's `image_mean` and `image_std`.
            options: further arguments of each call.
        """
        mean, std = normalisation["image_mean"], normalisation["image_std"]
        super().__init__(
            width=width,
            summary_width=width,
            grid=image_size // config.patch_size,
            image_size=image_size,
            mean=mean,
            std=std,
            depth=config.num_hidden_layers,
            layer_width=config.hidden_size,
        )
        self.tokens, self.norm, self.projection = tokens, norm, projection
        self.prefix, self.options = prefix, options

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, without CLS and register tokens."""
        outputs = self.tokens(images, output_hidden_states=bool(layers), **self.options)
        tokens, pooled = outputs.last_hidden_state[:, self.prefix :], outputs.pooler_output
        patches = self.projection(self.norm(tokens))
        # A SigLIP without its head pools nothing.
        summary = patches.mean(1) if pooled is None else self.projection(pooled)
        # The first hidden states are the embeddings.
        return Features(patches, summary, tuple(outputs.hidden_states[1 + layer][:, self.prefix :] for layer in layers))


def hugging_face_vit(folder: Path, *, image_size: int) -> HuggingFaceTokens:
    """The vision tower of the model in `folder` (config.json, weights, and preprocessor_config.json if it is there).

    Args:
        folder: the model on disk; nothing is downloaded.
        image_size: side of the input in pixels, 0 for the model's own.

    Raises:
        MissingPackageError: transformers is not installed.
        ConfigError: the model is of an unknown kind, or its patches do not divide the image.
        CheckpointError: the folder cannot be read or lacks weights.
    """
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"teacher.source=hf:{folder} needs transformers: pip install 'w2s[hf]'") from error
    kind = _read_json(folder / "config.json").get("model_type")
    if kind not in CLASSES:
        raise ConfigError(f"teacher.source=hf:{folder} is a {kind}: use one of {', '.join(CLASSES)}")
    with reading(folder, kind):
        model, info = getattr(transformers, CLASSES[kind]).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"teacher weights {folder} lack {missing[0]}: fetch the whole model")
    return _wrap(model.float(), kind, folder, image_size)


def _wrap(model: Any, kind: str, folder: Path, image_size: int) -> HuggingFaceTokens:
    config = getattr(model.config, "vision_config", model.config)
    size = image_size or config.image_size
    check_image_size(size, config.patch_size)
    resized = {"interpolate_pos_encoding": True} if size != config.image_size and "dino" not in kind else {}
    wrap: Callable[..., HuggingFaceTokens] = HuggingFaceTokens
    common = {"config": config, "image_size": size, "options": resized}
    if kind.startswith("clip"):
        tower, head = model.vision_model, model.visual_projection
        own = _normalisation(folder, CLIP)
        return wrap(tower, tower.post_layernorm, head, prefix=1, width=head.out_features, normalisation=own, **common)
    prefix = 0 if kind.startswith("siglip") else 1 + getattr(config, "num_register_tokens", 0)
    own = _normalisation(folder, HALF if kind.startswith("siglip") else IMAGENET)
    none = nn.Identity()
    return wrap(model, none, none, prefix=prefix, width=config.hidden_size, normalisation=own, **common)


def _normalisation(folder: Path, usual: dict[str, list[float]]) -> dict[str, list[float]]:
    """Mean and std of the folder's preprocessing, or those that are usual for the kind of model."""
    path = folder / "preprocessor_config.json"
    return {**usual, **(_read_json(path) if path.is_file() else {})}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher.source: {path} cannot be read: give a folder of transformers") from error
    return content
