"""EVA's vision towers as teachers: a released file, its folder of transformers, or a run of ours.

The network is timm's `Eva`, a plain module that every rank holds whole. Its weights stay mapped to their file where the
arithmetic is the file's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from w2s.checkpoint.export.formats.plain_vision import image_tower, zero_key_biases
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.weights.matching import MASKED_STAGE
from w2s.checkpoint.weights.released import Released, open_released, rename
from w2s.checkpoint.weights.tensor_files import open_weights
from w2s.config.load import model_from, named_model
from w2s.config.sections import ModelConfig, VisionConfig, Weights
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.base import Precision
from w2s.teachers.networks.teacher_weights import check_tensors
from w2s.teachers.networks.timm_vit import TimmTokens, resize_input
from w2s.towers.vision import channel_statistics


def eva_vit(name: str, file: Path | None, *, image_size: int, precision: Precision) -> TimmTokens:
    """The vision tower of an EVA-CLIP's file in the released names (or open_clip's, or timm's).

    Args:
        name: the model in configs/model, or a path that ends in `.yaml`.
        file: its weights: a file, an index, or a folder; None leaves them random, on torch's current device.
        image_size: side of the input in pixels, 0 for the size that the weights are of.
        precision: what the matrix multiplications compute in.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: the file cannot be read or holds another model.
    """
    if file is None:
        model = named_model(name)
        tower = image_tower(model, has_head=True, device=torch.get_default_device())
        return _wrapped(tower, model.vision, image_size)
    return _network(rename(open_weights(file), file), named_model(name), image_size, precision)


def describes_evaclip(settings: Mapping[str, Any]) -> bool:
    """Whether the config.json of a folder of transformers is of EVA-CLIP's own code."""
    named = [*(settings.get("architectures") or []), *(settings.get("auto_map") or {}).values()]
    return any("evaclip" in str(name).lower() for name in named)


def evaclip_folder(folder: Path, settings: Mapping[str, Any], *, image_size: int, precision: Precision) -> TimmTokens:
    """The vision tower of EVA-CLIP's own folder of transformers, without the code in it.

    Args:
        folder: the folder; its weights may be in several files.
        settings: its config.json.
        image_size: side of the input in pixels, 0 for the size that the weights are of.
        precision: what the matrix multiplications compute in.

    Raises:
        ConfigError: it is a kind of tower that only timm has.
        CheckpointError: the weights are missing, or are not an EVA-CLIP's.
    """
    vision = settings.get("vision_config") or settings
    for key in ("use_rope", "use_sub_ln", "use_swiglu_mlp"):
        if vision.get(key):
            raise ConfigError(f"teacher.source=hf:{folder} has {key}=true, use timm:eva02_…_clip_…@FILE instead")
    released = rename(open_weights(folder), folder)
    return _network(released, _evaclip_model(released, vision), image_size, precision)


def _evaclip_model(released: Released, vision: Mapping[str, Any]) -> ModelConfig:
    """The shape of a folder's vision tower: of its weights, and for what they do not say of its config.json."""
    shapes = {name: tensor.shape for name, tensor in released.meta.items()}
    try:
        width, mlp = shapes["visual.cls_token"][-1], shapes["visual.blocks.0.mlp.fc1.weight"][0]
        return ModelConfig(
            embed_dim=shapes["visual.head.weight"][0] if "visual.head.weight" in shapes else 1,
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                layers=vision["num_hidden_layers"],
                width=width,
                heads=vision["num_attention_heads"],
                mlp_width=mlp,
                norm="layernorm" if "visual.norm.bias" in shapes else "rmsnorm",
                norm_placement="post" if vision.get("post_layernorm") else "pre",
                qkv_bias="visual.blocks.0.attn.q_bias" in shapes,
            ),
        )
    except KeyError as error:
        raise CheckpointError(
            f"teacher weights {released.path} are not a whole EVA-CLIP: {error} is missing"
        ) from error


def w2s_run(checkpoint: Path, *, image_size: int, precision: Precision, weights: Weights = "last") -> TimmTokens:
    """The vision tower of a checkpoint of ours: of a clip run with its head, of a masked run without.

    A masked run with a summary target has trained the head on summaries alone: its summary goes through it.

    Raises:
        CheckpointError: the checkpoint is damaged, or has no vision tower or no moving average.
    """
    return _network(open_released(checkpoint, weights), model_from(read_meta(checkpoint).config), image_size, precision)


def _network(released: Released, model: ModelConfig, image_size: int, precision: Precision) -> TimmTokens:
    tower = image_tower(model, has_head=released.embeds_images)
    tower.load_state_dict(_weights(tower, released, precision), assign=True)
    zero_key_biases(tower)
    return _wrapped(tower, model.vision, image_size, masked=released.is_masked)


def _wrapped(tower: Eva | VisionTransformer, vision: VisionConfig, image_size: int, masked: bool = False) -> TimmTokens:
    mean, std = channel_statistics(vision)
    if image_size:
        resize_input(tower, image_size)
    return TimmTokens(tower, nn.Identity() if masked else tower.head, projection=tower.head, mean=mean, std=std)


def _weights(tower: nn.Module, released: Released, precision: Precision) -> dict[str, Tensor]:
    """The tower's tensors out of the file's, none of them kept in a wider type than is used."""
    wanted = {f"visual.{name}": value for name, value in tower.state_dict().items()}
    check_tensors(released, wanted, ignored=MASKED_STAGE)
    return {name.removeprefix("visual."): _as_used(name, released.read(name), precision) for name in wanted}


def _as_used(name: str, tensor: Tensor, precision: Precision) -> Tensor:
    multiplied = name.endswith("weight") and tensor.ndim > 1
    return tensor.to(torch.bfloat16 if precision == "bf16" and multiplied else torch.float32)
