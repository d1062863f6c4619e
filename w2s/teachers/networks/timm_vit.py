"""Models of timm as teachers, with weights from a local file or random ones.

A feature of a ViT is `head(norm(token))` of a patch token, as EVA's targets are: after the final norm, and after the
projection into the shared space where the model has one. Of any other model it is a place of the last feature map.
The summary is what timm's own head makes of all of them: pooled, and through the projection where there is one.
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.base import Features, PatchNetwork, check_image_size
from w2s.teachers.networks.teacher_weights import LOCAL, indexed, reading, unknown_model


class TimmTokens(PatchNetwork):
    """Patch tokens of a timm ViT: `head(fc_norm(tokens))`, where `tokens` are after the final norm."""

    def __init__(
        self,
        trunk: Eva | VisionTransformer,
        head: nn.Module,
        *,
        projection: nn.Module | None = None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Wrap `trunk`.

        Args:
            trunk: the model.
            head: what each of its patch tokens goes through.
            projection: what its pooled feature goes through; None for `head`.
            mean, std: what the input must be normalised with.
        """
        projection = head if projection is None else projection
        super().__init__(
            width=_width(trunk, head),
            summary_width=_width(trunk, projection),
            grid=trunk.patch_embed.grid_size[0],
            image_size=trunk.patch_embed.img_size[0],
            mean=mean,
            std=std,
            depth=len(trunk.blocks),
            layer_width=trunk.embed_dim,
        )
        self.trunk = trunk
        self.head, self.projection = head, projection

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, without CLS and register tokens."""
        tokens, after = self._tokens(images, layers)
        patches = self.head(self.trunk.fc_norm(tokens[:, self.trunk.num_prefix_tokens :]))
        return Features(patches, self.projection(self.trunk.forward_head(tokens, pre_logits=True)), after)

    def _tokens(self, images: Tensor, layers: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All tokens after the final norm, and patch tokens after some layers."""
        if not layers:
            return self.trunk.forward_features(images), ()
        wanted = sorted(set(layers))
        tokens, taken = self.trunk.forward_intermediates(images, indices=wanted, output_fmt="NLC")
        by_layer = dict(zip(wanted, taken, strict=True))
        return tokens, tuple(by_layer[layer] for layer in layers)


def _width(trunk: Eva | VisionTransformer, head: nn.Module) -> int:
    """Channels after a head, which may be none."""
    widths = [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)]
    return widths[-1] if widths else trunk.num_features


class TimmMaps(PatchNetwork):
    """The last feature map of any other timm model, convolutional or not, before pooling and classifier."""

    def __init__(self, trunk: Any, name: str, *, image_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Wrap the model `name` for images of `image_size` pixels.

        Raises:
            ConfigError: it does not take that size, or makes no square map of it.
        """
        pool = pooling(trunk)
        grid, summary_width = sizes_of(trunk, pool, name, image_size)
        width = trunk.num_features
        super().__init__(width=width, summary_width=summary_width, grid=grid, image_size=image_size, mean=mean, std=std)
        self.trunk, self.pool = trunk, pool

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, and what timm's head pools them to."""
        features = self.trunk.forward_features(images)
        return Features(to_tokens(self.trunk, features), self.pool(features))


def pooling(trunk: Any) -> Callable[[Tensor], Tensor]:
    """What makes one vector an image of a model's last features: its head up to the classifier, or else a mean."""
    if "pre_logits" in inspect.signature(trunk.forward_head).parameters:
        return partial(trunk.forward_head, pre_logits=True)
    return lambda features: to_tokens(trunk, features).mean(1)


def to_tokens(trunk: Any, features: Tensor) -> Tensor:
    """The last features of a model as [n, places, width], from a map of either order or from tokens."""
    if features.ndim == 3:
        return features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    channels = 3 if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else 1
    return features.movedim(channels, 1).flatten(2).transpose(1, 2)


def sizes_of(trunk: Any, pool: Callable[[Tensor], Tensor], name: str, image_size: int) -> tuple[int, int]:
    """Features along one side of what a model makes of an image, and width of its summary, seen on an empty one.

    Raises:
        ConfigError: it does not take that size, or makes no square map of it.
    """
    try:
        with torch.no_grad():
            features = trunk.eval().forward_features(torch.zeros(1, 3, image_size, image_size))
            positions, summary_width = to_tokens(trunk, features).shape[1], pool(features).shape[1]
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"teacher.image_size={image_size} does not suit {name}: {reason}") from error
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ConfigError(f"teacher.source: {name} makes {positions} features, no square map: choose another model")
    return side, summary_width


def timm_model(name: str, file: Path | None, *, image_size: int) -> PatchNetwork:
    """The timm model `name`, written `ARCHITECTURE`, `ARCHITECTURE.TAG`, or `local-dir:FOLDER` with a config.json.

    The file may be timm's, open_clip's or EVA-CLIP's release: timm's own conversion reads all of them. The head is kept
    where it is the projection of a CLIP and left out where it is a classifier.

    Args:
        name: the model.
        file: its weights (PyTorch or safetensors); None leaves them random.
        image_size: side of the input in pixels, 0 for the model's own.

    Raises:
        ConfigError: timm has no such model, or the image size does not suit it.
        CheckpointError: the file cannot be read or holds another model.
    """
    _check_name(name)
    with reading(file, name):
        local = _overlay(file)
        trunk = timm.create_model(name, pretrained=file is not None, pretrained_cfg_overlay=local)
    settings, architecture = trunk.pretrained_cfg, trunk.pretrained_cfg["architecture"]
    mean, std = settings["mean"], settings["std"]
    if not isinstance(trunk, Eva | VisionTransformer):
        size = image_size or settings["input_size"][-1]
        return TimmMaps(trunk, name, image_size=size, mean=mean, std=std)
    tag = settings["tag"] or ""
    is_projection = "_clip_" in f"_{architecture}_{tag}_" and "_ft_" not in tag
    resize_input(trunk, image_size)
    return TimmTokens(trunk, trunk.head if is_projection else nn.Identity(), mean=mean, std=std)


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know, or a folder that does not describe a model of timm."""
    if name.startswith(LOCAL):
        return _check_folder(Path(name.removeprefix(LOCAL)))
    architecture, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{architecture}.*") if tag and timm.is_model(architecture) else timm.list_models()
    if name not in known:
        raise unknown_model("timm", name, known)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that does not describe a model of timm, and name the source that suits it."""
    try:
        described = "architecture" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        described = False
    if not described:
        others = {"open_clip_config.json": f"open_clip:{LOCAL}{folder}", "config.json": f"hf:{folder}"}
        suits = next((source for name, source in others.items() if (folder / name).is_file()), "timm:MODEL@FILE")
        raise CheckpointError(f"teacher.source: {folder}/config.json describes no model of timm: use {suits}")


def _overlay(file: Path | None) -> dict[str, Any] | None:
    """What makes timm load a file instead of a download."""
    if file is None:
        return None
    tensors = indexed(file)
    return {"source": "", "custom_load": False, **({"state_dict": tensors} if tensors else {"file": str(file)})}


def resize_input(trunk: Eva | VisionTransformer, image_size: int) -> None:
    """Resample the positions of a timm ViT for another input size in pixels; 0 keeps its own.

    Raises:
        ConfigError: its patches do not divide the image.
    """
    if image_size:
        check_image_size(image_size, trunk.patch_embed.patch_size[0])
        trunk.set_input_size(img_size=image_size)
