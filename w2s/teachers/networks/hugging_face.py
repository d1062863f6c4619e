"""Vision models of Hugging Face transformers as teachers, from a folder on disk.

A feature is a patch token, or a place of the last map, after the final norm, and after the projection where the model
projects what it pools and pools a token or the mean of them (CLIP). Where attention pools the tokens (SigLIP, AIMv2)
they stay as they are. The summary is the model's own: its embedding of an image, or what it pools; otherwise the class
token; otherwise the mean over the patches.
"""

import inspect
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from w2s.errors import CheckpointError, ConfigError, MissingPackageError
from w2s.teachers.base import PatchNetwork, Precision, check_image_size
from w2s.teachers.networks.eva_vit import describes_evaclip, evaclip_folder
from w2s.teachers.networks.hugging_face_features import HuggingFaceFeatures, Parts
from w2s.teachers.networks.hugging_face_inputs import called_with_images
from w2s.teachers.networks.internvit_folder import KINDS, internvit
from w2s.teachers.networks.teacher_weights import LOCAL, reading, weights_file
from w2s.teachers.networks.timm_vit import TimmTokens, resize_input, timm_model

logger = logging.getLogger(__name__)

TOWERS = ("vision_model", "vision_tower", "vision_encoder", "image_model")
"""Where a model of images and texts has its vision tower."""
ROUTE = "use a model of timm:, open_clip: or transformers that gives tokens of patches, or a map"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PLAIN = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}


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
    if describes_evaclip(settings):
        return evaclip_folder(folder, settings, image_size=image_size, precision=precision)
    if "architecture" in settings and "model_type" not in settings:
        file = weights_file(str(folder), "hf", str(folder))
        return timm_model(f"{LOCAL}{folder}", file, image_size=image_size)
    source = f"teacher.source=hf:{folder}"
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{source} needs transformers: pip install 'w2s[hf]'") from error
    kind = settings.get("model_type") or "unnamed"
    return _wrap(_load(transformers, settings, kind, folder), kind, folder, image_size, source)


def _load(transformers: Any, settings: dict[str, Any], kind: str, folder: Path) -> Parts:
    """The parts of a folder's model that make features.

    Raises:
        MissingPackageError: transformers is too old for a model that it has under another name.
        ConfigError: transformers has no class for it.
        CheckpointError: weights of them are missing, or cannot be read.
    """
    source = f"teacher.source=hf:{folder}"
    if kind in KINDS:
        if not hasattr(transformers, "InternVLVisionModel"):
            raise MissingPackageError(f"{source} needs transformers of 2025 or later: pip install -U transformers")
        with reading(folder, kind):
            return Parts(internvit(transformers, folder, settings).float().eval(), nn.Identity())
    cls = _class(transformers, settings, kind, source)
    with reading(folder, kind), _quiet(transformers.logging):
        model, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    return _parts(model, info["missing_keys"], folder)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' bar, and its table of missing and unexpected weights, which are judged here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _class(transformers: Any, settings: dict[str, Any], kind: str, source: str) -> Any:
    """The class that holds a folder's vision tower, and its projection if the folder has one.

    Raises:
        ConfigError: transformers has none.
    """
    if kind not in transformers.CONFIG_MAPPING:
        newer = f"which transformers {transformers.__version__} does not have: install a newer one, or {ROUTE}"
        raise ConfigError(f"{source} is of the type {kind}, {newer}")
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
    # transformers 4 may put the base model's prefix before a name
    absent = {*missing, *(name.removeprefix(f"{model.base_model_prefix}.") for name in missing)}
    lacking = sorted(name for name, parameter in model.named_parameters() if name in absent and id(parameter) in kept)
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
    usual_size = _own_size(config, folder, patch) if trunk is None else trunk.pretrained_cfg["input_size"][-1]
    size = image_size or usual_size
    if patch:
        check_image_size(size, patch)
    resizes = "interpolate_pos_encoding" in inspect.signature(parts.tower.forward).parameters and size != usual_size
    options = {"interpolate_pos_encoding": True} if resizes else {}
    taking_images = parts._replace(tower=called_with_images(parts.tower))
    try:
        return HuggingFaceFeatures(
            taking_images, image_size=size, patch=patch, options=options, normalisation=normalisation
        )
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        if image_size not in (0, usual_size):
            raise ConfigError(
                f"teacher.image_size={size} does not suit {source}: {reason}; use {usual_size}"
            ) from error
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
    described, usual = _preprocessing(folder), _usual(kind)
    if trunk is not None:
        usual = {"image_mean": trunk.pretrained_cfg["mean"], "image_std": trunk.pretrained_cfg["std"]}
    if described is None:
        logger.warning(
            "%s has no preprocessor_config.json: its images get mean %s and std %s, as is usual for a %s",
            folder, usual["image_mean"], usual["image_std"], kind,
        )  # fmt: skip
        return usual
    return PLAIN if described.get("do_normalize") is False else {**usual, **described}


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
            raise CheckpointError(f"teacher.source=hf:{folder} is not a folder of transformers: use {source}")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher.source: {path} cannot be read: give a model's folder on disk") from error
    return content
