"""Vision models of Hugging Face transformers as teachers, from a folder on disk.

A feature is a patch token, or a place of the last map, after the final norm, and after the projection where the model
projects what it pools and pools a token or the mean of them (CLIP). Where attention pools the tokens (SigLIP, AIMv2)
they stay as they are. The summary is the model's own: its embedding of an image, or what it pools; else the class
token; else the mean over the patches.

There is no list of models: what one makes of a first image says where its patches are and how it pools them.
"""

import inspect
import json
import logging
import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from w2s.errors import CheckpointError, ConfigError, MissingPackageError
from w2s.teachers.base import Features, PatchNetwork, Precision, check_image_size
from w2s.teachers.eva_vit import evaclip_folder, is_evaclip
from w2s.teachers.hugging_face_inputs import called_with_images
from w2s.teachers.timm_vit import TimmTokens, resize_input, timm_model
from w2s.teachers.weights import LOCAL, reading, weights_file

logger = logging.getLogger(__name__)

TOWERS = ("vision_model", "vision_tower", "vision_encoder", "image_model")
"""Where a model of images and texts has its vision tower."""
MOST_PREFIX_TOKENS = 16
"""Class tokens and registers before the patches: RADIO has ten, Pixio eight."""
OTHER_CODE = {
    name: "use a folder of InternVL in transformers' own format (…-hf), or timm:vit_intern300m_patch14_448@FILE"
    for name in ("intern_vit_6b", "internvl_chat")
}
"""Where the models of folders that bring code of their own are found, by `model_type`."""
ROUTE = "use a model of timm:, open_clip: or transformers that gives tokens of patches, or a map"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PLAIN = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}


class Parts(NamedTuple):
    """The parts of a transformers model that make features."""

    tower: nn.Module
    """From images to `last_hidden_state`, and to what it pools."""
    projection: nn.Module | None
    """What the pooled output goes through; None where pooling has no weights: classifiers are published without."""


class HuggingFaceFeatures(PatchNetwork):
    """Patch tokens, or the last map, of a transformers model."""

    def __init__(
        self, parts: Parts, *, image_size: int, patch: int, options: dict[str, Any], normalisation: dict[str, Any]
    ) -> None:
        """Wrap a model and look at what it makes of two images.

        Args:
            parts: the model.
            image_size: side of the input in pixels.
            patch: side of a patch in pixels, 0 if it is not known.
            options: further arguments of each call.
            normalisation: `image_mean` and `image_std`.

        Raises:
            ValueError: its features are no square map.
        """
        layered = hasattr(getattr(parts.tower, "config", None), "num_hidden_layers")
        images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs = parts.tower(images, **options, **({"output_hidden_states": True} if layered else {}))
            tokens = _rows(outputs.last_hidden_state)
            prefix, grid = _places(tokens, image_size, patch)
            norm, head = _pooling(parts, outputs, tokens, prefix)
            features = _features(outputs, prefix, norm, head, parts.projection)
        hidden = (outputs.hidden_states or [])[1:] if layered else []
        depth = len(hidden) if all(after.shape[:2] == tokens.shape[:2] for after in hidden) else 0
        super().__init__(
            width=features.patches.shape[-1],
            summary_width=features.summary.shape[-1],
            grid=grid,
            image_size=image_size,
            mean=normalisation["image_mean"],
            std=normalisation["image_std"],
            depth=depth,
            layer_width=hidden[0].shape[-1] if depth else 0,
        )
        self.prefix, self.options = prefix, options
        self.tower, self.norm, self.head, self.projection = parts.tower, norm, head, parts.projection

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, without class tokens and registers."""
        outputs = self.tower(images, **self.options, **({"output_hidden_states": True} if layers else {}))
        features = _features(outputs, self.prefix, self.norm, self.head, self.projection)
        # The first hidden states are the embeddings.
        return features._replace(layers=tuple(outputs.hidden_states[1 + layer][:, self.prefix :] for layer in layers))


def _features(outputs: Any, prefix: int, norm: nn.Module, head: nn.Module, projection: nn.Module | None) -> Features:
    tokens = _rows(outputs.last_hidden_state)
    patches = head(norm(tokens[:, prefix:]))
    pooled = _pooled(outputs)
    if pooled is not None and projection is not None:
        return Features(patches, projection(pooled))
    return Features(patches, tokens[:, 0] if prefix else patches.mean(1))


def _pooled(outputs: Any) -> Tensor | None:
    """One vector an image: RADIO's summary, all others' pooled output."""
    pooled = getattr(outputs, "summary", None)
    pooled = getattr(outputs, "pooler_output", None) if pooled is None else pooled
    return None if pooled is None else pooled.flatten(1)


def _rows(hidden: Tensor) -> Tensor:
    """Hidden states as [n, places, width], from tokens or from a square map with its channels first or last."""
    if hidden.ndim == 3:
        return hidden
    return hidden.movedim(1 if hidden.shape[2] == hidden.shape[3] else 3, 1).flatten(2).transpose(1, 2)


def _places(tokens: Tensor, image_size: int, patch: int) -> tuple[int, int]:
    """Tokens before the patches, and patches along one side, of what a model makes of two images.

    Raises:
        ValueError: they are no square map of an image.
    """
    count, grid = tokens.shape[1], image_size // patch if patch else 0
    if grid and count >= grid**2:
        possible = [count - grid**2]
    else:
        # patches that were merged on the way, behind at most a class token
        possible = [prefix for prefix in (0, 1) if _is_map(count - prefix, image_size)]
    if len(tokens) != 2 or not possible or possible[0] > MOST_PREFIX_TOKENS:
        raise ValueError(f"it makes {count} tokens of {image_size} px, which are no square map of patches")
    return possible[0], math.isqrt(count - possible[0])


def _is_map(places: int, image_size: int) -> bool:
    """Whether places are as many as squares of an image can be."""
    side = math.isqrt(places)
    return places > 0 and side**2 == places and image_size % side == 0


def _pooling(parts: Parts, outputs: Any, tokens: Tensor, prefix: int) -> tuple[nn.Module, nn.Module]:
    """The norm that comes only after pooling, and the projection that each token can go through.

    Both are found by what is pooled: the class token, or a mean of tokens, through that norm. Where it is anything
    else, of an attention pool or a tanh, tokens stay as they are.
    """
    pooled = _pooled(outputs)
    means = [tokens[:, prefix:].mean(1), *([tokens[:, 0], tokens[:, :prefix].mean(1)] if prefix else [])]
    if pooled is not None and parts.projection is not None and pooled.shape == means[0].shape:
        for norm in (nn.Identity(), *_norms(parts.tower, pooled.shape[1])):
            for mean in means:
                if torch.allclose(norm(mean), pooled, rtol=1e-3, atol=1e-3 * float(pooled.abs().max())):
                    return norm, parts.projection
    return nn.Identity(), nn.Identity()


def _norms(tower: nn.Module, width: int) -> Iterator[nn.Module]:
    """Norms of a tower outside of its layers, the last one first."""
    for name, module in reversed(list(tower.named_modules())):
        kind, weight = type(module).__name__.lower(), getattr(module, "weight", None)
        outside = name.count(".") < 2 and "norm" in kind and "batch" not in kind
        if outside and weight is not None and weight.shape == (width,):
            yield module


def hugging_face_model(folder: Path, *, image_size: int, precision: Precision) -> PatchNetwork:
    """The vision model in `folder` (config.json, weights, and preprocessor_config.json if it is there).

    Args:
        folder: the model on disk; nothing is downloaded and no code in it is run.
        image_size: side of the input in pixels, 0 for the model's own.
        precision: what an EVA-CLIP's matrix multiplications compute in.

    Raises:
        MissingPackageError: transformers is not installed.
        ConfigError: transformers has no such model, it gives no features of patches, or the size does not suit it.
        CheckpointError: the folder cannot be read or lacks weights.
    """
    settings = _settings(folder)
    if is_evaclip(settings):
        return evaclip_folder(folder, settings, image_size=image_size, precision=precision)
    if "architecture" in settings and "model_type" not in settings:
        file = weights_file(str(folder), "hf", str(folder))
        return timm_model(f"{LOCAL}{folder}", file, image_size=image_size)
    source = f"teacher.source=hf:{folder}"
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{source} needs transformers: pip install 'w2s[hf]'") from error
    kind = settings.get("model_type") or "none"
    cls = _class(transformers, settings, kind, source)
    with reading(folder, kind):
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    parts = _parts(model, info["missing_keys"], folder)
    return _wrap(parts, kind, folder, image_size, source)


def _class(transformers: Any, settings: dict[str, Any], kind: str, source: str) -> Any:
    """The class that holds a folder's vision tower, and its projection if the folder has one.

    Raises:
        ConfigError: transformers has none.
    """
    if kind not in transformers.CONFIG_MAPPING:
        other = OTHER_CODE.get(kind, ROUTE)
        version = transformers.__version__
        raise ConfigError(f"{source} is of the type {kind}, which transformers {version} does not have: {other}")
    config = transformers.CONFIG_MAPPING[kind]
    named = (settings.get("architectures") or [""])[0]
    cls = transformers.MODEL_MAPPING.get(config, None)
    if named.endswith("WithProjection"):
        cls = getattr(transformers, named, cls)
    sees = cls is not None and (hasattr(cls, "get_image_features") or cls.main_input_name == "pixel_values")
    if not sees or settings.get("is_encoder_decoder") or "detr" in kind:
        raise ConfigError(f"{source} is of the type {kind}, which gives no features of an image's patches: {ROUTE}")
    return cls


def _parts(model: Any, missing: Sequence[str], folder: Path) -> Parts:
    """The parts of a model that make features, in float32.

    Raises:
        CheckpointError: weights of them are missing.
    """
    tower = next((getattr(model, name) for name in TOWERS if hasattr(model, name)), model)
    projection = getattr(model, "visual_projection", nn.Identity())
    kept = {id(parameter) for part in (tower, projection) for parameter in part.parameters()}
    lacking = sorted(name for name, parameter in model.named_parameters() if name in missing and id(parameter) in kept)
    pooling = [name for name in lacking if {"pooler", "head"} & set(name.split("."))]
    needed = [name for name in lacking if name not in pooling and not name.endswith("mask_token")]
    if needed:
        raise CheckpointError(f"teacher weights {folder} lack {needed[0]}: fetch the whole model")
    return Parts(tower.float().eval(), None if pooling else projection.float().eval())


def _wrap(parts: Parts, kind: str, folder: Path, image_size: int, source: str) -> PatchNetwork:
    trunk = getattr(parts.tower, "timm_model", None)
    normalisation = _normalisation(folder, kind, trunk)
    if isinstance(trunk, Eva | VisionTransformer):
        return _timm_tokens(trunk, parts.projection or nn.Identity(), image_size, normalisation)
    config: Any = parts.tower.config
    config.tie_last_hidden_states = False  # of the last layer, too, tokens are asked for without a norm
    patch = _side(getattr(config, "patch_stride", None) or getattr(config, "patch_size", 0))
    own = _own_size(config, folder, patch) if trunk is None else trunk.pretrained_cfg["input_size"][-1]
    size = image_size or own
    if patch:
        check_image_size(size, patch)
    resizes = "interpolate_pos_encoding" in inspect.signature(parts.tower.forward).parameters and size != own
    options = {"interpolate_pos_encoding": True} if resizes else {}
    seen = parts._replace(tower=called_with_images(parts.tower))
    try:
        return HuggingFaceFeatures(seen, image_size=size, patch=patch, options=options, normalisation=normalisation)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        if image_size not in (0, own):
            raise ConfigError(f"teacher.image_size={size} does not suit {source}: {reason}; use {own}") from error
        raise ConfigError(
            f"{source} is of the type {kind}, which gives no features of an image: {reason}; {ROUTE}"
        ) from error


def _timm_tokens(
    trunk: Eva | VisionTransformer, projection: nn.Module, image_size: int, normalisation: dict[str, Any]
) -> TimmTokens:
    """A vision transformer of timm in a model of transformers, which would not resize its positions."""
    resize_input(trunk, image_size)
    head = projection if trunk.attn_pool is None else nn.Identity()
    mean, std = normalisation["image_mean"], normalisation["image_std"]
    return TimmTokens(trunk, head, projection=projection, mean=mean, std=std)


def _side(size: Any) -> int:
    """The side of a square that may be given by both."""
    return int(size[0] if isinstance(size, list | tuple) else size)


def _own_size(config: Any, folder: Path, patch: int) -> int:
    """Side of the images that a model was trained with, as far as its folder says."""
    if getattr(config, "image_size", None):
        return _side(config.image_size)
    if hasattr(config, "num_patches"):
        return math.isqrt(config.num_patches) * patch
    preprocessing = _preprocessing(folder) or {}
    size = preprocessing.get("crop_size") or preprocessing.get("size") or 224
    return int(next(iter(size.values())) if isinstance(size, dict) else _side(size))


def _normalisation(folder: Path, kind: str, trunk: Any) -> dict[str, Any]:
    """Mean and std of the folder's preprocessing, or those that are usual for the kind of model or timm's trunk."""
    found, usual = _preprocessing(folder), _usual(kind)
    if trunk is not None:
        usual = {"image_mean": trunk.pretrained_cfg["mean"], "image_std": trunk.pretrained_cfg["std"]}
    if found is None:
        logger.warning(
            "%s has no preprocessor_config.json: its images get mean %s and std %s, as is usual for a %s",
            folder, usual["image_mean"], usual["image_std"], kind,
        )  # fmt: skip
        return usual
    return PLAIN if found.get("do_normalize") is False else {**usual, **found}


def _usual(kind: str) -> dict[str, Any]:
    if kind.startswith(("radio", "tipsv2")):
        return PLAIN
    if kind.startswith("siglip") or kind in ("vit", "beit", "data2vec-vision"):
        return HALF
    return CLIP if "clip" in kind or kind.startswith(("aimv2", "mlcd", "blip", "owl")) else IMAGENET


def _preprocessing(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its images' preparation; transformers 5 may keep it beside that of texts."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = _read_json(folder / name)
            return content.get("image_processor", content)
    return None


def _settings(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: it cannot be read; with the source that suits the folder, if there is one.
    """
    for name, source in (("open_clip_config.json", f"open_clip:{LOCAL}{folder}"), ("meta.json", f"w2s:{folder}")):
        if (folder / name).is_file() and not (folder / "config.json").is_file():
            raise CheckpointError(f"teacher.source=hf:{folder} is no folder of transformers: use {source}")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher.source: {path} cannot be read: give a model's folder on disk") from error
    return content
