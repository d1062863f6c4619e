"""Kinds of teacher: each built small from a configuration, with what its own modules make of an image.

The table of docs/teachers.md is this list (`test_families.py`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.teachers.networks.evaclip import EvaClip, save_evaclip
from tests.teachers.networks.internvit import InternViT, save_internvit

Pair = tuple[Tensor, Tensor]

PROJECTED = "`projection(norm(patch))`"
NORMED = "`norm(patch)`"
BARE = "`patch`, as the last layer leaves it"
PLACES = "each place of the last map, through the norm that comes after pooling where there is one"

SIZE = {"image_size": 32, "patch_size": 8}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZE, **TOWER, "intermediate_size": 64}
TEXT = {**TOWER, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 8}
PYRAMID = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "image_size": 64}


@dataclass(frozen=True)
class Family:
    """A kind of teacher."""

    name: str
    target: str
    """What a feature is, for the table."""
    save: Callable[[Path], Any]
    """Write a model with random weights into a folder; return the model."""
    expected: Callable[[Any, Tensor], Pair]
    """Patch features [n, P, D] and summary [n, E] of images [n, 3, T, T], by the model's own modules."""
    source: str = "hf:FOLDER"
    size: int = 32
    """Side of its images in pixels."""
    other_size: int = 48
    """Another side that it takes; 0 if it takes none."""


def saved(kind: str, config: str, **settings: Any) -> Callable[[Path], Any]:
    """What saves the transformers model `kind` of the configuration `config`."""

    def save(folder: Path) -> Any:
        if not hasattr(transformers, kind):
            pytest.skip(f"transformers {transformers.__version__} has no {kind}")
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
        perturb(model)
        model.save_pretrained(folder)
        return model

    return save


def perturb(model: torch.nn.Module) -> None:
    """Random weights where a model begins with ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()


def clip(model: Any, images: Tensor) -> Pair:
    """The way of a class token to the embedding, for every patch."""
    tower = model.vision_model
    hidden = tower(images).last_hidden_state
    embedded = model.visual_projection(tower.post_layernorm(hidden))
    return embedded[:, 1:], embedded[:, 0]


def tokens(prefix: int, tower: Callable[[Any], Any] = lambda model: model) -> Callable[[Any, Tensor], Pair]:
    """Tokens after the prefix, and the pooled output."""

    def expected(model: Any, images: Tensor) -> Pair:
        outputs = tower(model)(images)
        return outputs.last_hidden_state[:, prefix:], outputs.pooler_output.flatten(1)

    return expected


def unpooled(prefix: int) -> Callable[[Any, Tensor], Pair]:
    """Tokens after the prefix, and the class token, or the mean where there is none."""

    def expected(model: Any, images: Tensor) -> Pair:
        hidden = model(images).last_hidden_state
        return hidden[:, prefix:], hidden[:, 0] if prefix else hidden.mean(1)

    return expected


def maps(norm: str = "") -> Callable[[Any, Tensor], Pair]:
    """Places of the last map through the norm `norm`, and the pooled output."""

    def expected(model: Any, images: Tensor) -> Pair:
        outputs = model(images)
        places = outputs.last_hidden_state.flatten(2).transpose(1, 2)
        return model.get_submodule(norm)(places) if norm else places, outputs.pooler_output.flatten(1)

    return expected


def naflex(model: Any, images: Tensor) -> Pair:
    """SigLIP 2's own cut into patches, image by image."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    patches = torch.stack([convert_image_to_patches(image, 8) for image in images])
    shapes = torch.tensor([[4, 4]] * len(images))
    outputs = model.vision_model(patches, torch.ones(patches.shape[:2], dtype=torch.int32), shapes)
    return outputs.last_hidden_state, outputs.pooler_output


def masked(model: Any, images: Tensor) -> Pair:
    """A masked autoencoder's tokens, put back in their order."""
    model.config.mask_ratio = 0.0
    outputs = model(images)
    hidden, places = outputs.last_hidden_state, outputs.ids_restore
    return torch.gather(hidden[:, 1:], 1, places[..., None].expand(-1, -1, hidden.shape[2])), hidden[:, 0]


def radio(model: Any, images: Tensor) -> Pair:
    """RADIO's own features and summary."""
    outputs = model(images)
    return outputs.features, outputs.summary


def beit(model: Any, images: Tensor) -> Pair:
    """BEiT's norm comes after the mean over the patches."""
    outputs = model(images)
    return model.pooler.layernorm(outputs.last_hidden_state[:, 1:]), outputs.pooler_output


def rerolled(model: Any, images: Tensor) -> Pair:
    """Hiera's last map in the order of rows."""
    outputs = model(images, output_hidden_states=True)
    return model.pooler.layernorm(outputs.reshaped_hidden_states[-1].flatten(1, 2)), outputs.pooler_output


def evaclip(model: EvaClip, images: Tensor) -> Pair:
    """EVA-CLIP's way of a class token to the embedding, for every patch."""
    embedded = model(images)
    return embedded[:, 1:], embedded[:, 0]


def internvit(model: InternViT, images: Tensor) -> Pair:
    """InternViT's tokens, whose first one is its summary."""
    after = model(images)
    return after[:, 1:], after[:, 0]


def dual(model: Any, images: Tensor) -> Pair:
    """A vision model and a text model under two projections."""
    outputs = model.vision_model(images)
    return model.visual_projection(outputs.last_hidden_state[:, 1:]), model.visual_projection(outputs.pooler_output)


def two(vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT, **settings: Any) -> dict[str, Any]:
    """Settings of a model with both towers."""
    return {"vision_config": dict(vision), "text_config": dict(text), **settings}


def save_dual(vision: Any) -> Callable[[Path], Any]:
    """What saves a vision model and a text model as transformers pairs them."""

    def save(folder: Path) -> Any:
        torch.manual_seed(0)
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            vision, transformers.CLIPTextConfig(**TEXT), projection_dim=12
        )
        model = transformers.VisionTextDualEncoderModel(config)
        perturb(model)
        model.save_pretrained(folder)
        return model

    return save


def saved_by_timm(name: str, **settings: Any) -> Callable[[Path], Any]:
    """What saves a model of timm as it is put on a hub."""

    def save(folder: Path) -> Any:
        torch.manual_seed(0)
        model = timm.create_model(name, **settings)
        perturb(model)
        timm.models.save_for_hf(model, folder, model_args=settings, safe_serialization=True)
        return model

    return save


def saved_by_open_clip(embed_dim: int = 12, coca: bool = False, **vision: Any) -> Callable[[Path], Any]:
    """What saves a CLIP of open_clip as it is put on a hub."""
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    if coca:
        config = {**config, "text_cfg": {**text, "embed_cls": True}, "multimodal_cfg": text}

    def save(folder: Path) -> Any:
        torch.manual_seed(0)
        model = (open_clip.CoCa if coca else open_clip.CLIP)(**config)
        perturb(model)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        return model.visual

    return save


def timm_vit(model: Any, images: Tensor) -> Pair:
    """A vision transformer of timm without its classifier."""
    hidden = model.forward_features(images)
    return model.fc_norm(hidden[:, model.num_prefix_tokens :]), model.forward_head(hidden, pre_logits=True)


def timm_clip(model: Any, images: Tensor) -> Pair:
    """A CLIP's vision transformer in timm, whose head is the projection."""
    return model.head(model.forward_features(images)[:, 1:]), model(images)


def timm_map(model: Any, images: Tensor) -> Pair:
    """The last map of a convolutional network of timm."""
    last = model.forward_features(images)
    return last.flatten(2).mT, model.forward_head(last, pre_logits=True)


def wrapped(model: Any, images: Tensor) -> Pair:
    """A vision transformer of timm in transformers."""
    outputs = model(images)
    return outputs.last_hidden_state[:, 1:], outputs.pooler_output


def open_clip_vit(visual: Any, images: Tensor) -> Pair:
    """Each token and the class token through open_clip's projection."""
    visual.output_tokens = True
    pooled, after = visual(images)
    return after @ visual.proj, pooled


def coca(visual: Any, images: Tensor) -> Pair:
    """What CoCa's pool makes of each token alone."""
    hidden = visual.transformer(visual._embeds(images))
    alone = [
        visual.ln_post(visual.attn_pool(hidden[:, place : place + 1]))[:, 0] for place in range(1, hidden.shape[1])
    ]
    return torch.stack(alone, 1) @ visual.proj, visual(images)


def attention_pooled(visual: Any, images: Tensor) -> Pair:
    """The tokens that a SigLIP's pool reads."""
    return visual.trunk.forward_features(images)[:, visual.trunk.num_prefix_tokens :], visual(images)


def convnext(visual: Any, images: Tensor) -> Pair:
    """Each place of the last map through norm and projection."""
    places = visual.trunk.head.norm(visual.trunk.forward_features(images)).flatten(2).mT
    return visual.head.proj(places), visual(images)


def resnet(visual: Any, images: Tensor) -> Pair:
    """Each place of the last map through the pool's values."""
    last = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    pool = visual.attnpool
    return pool.c_proj(pool.v_proj(last.flatten(2).mT)), visual(images)


LLAMA = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
HEADLESS = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
DINO = {**SIZE, **TOWER, "mlp_ratio": 2}
STAGES = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
OPEN_CLIP_VIT = {**SIZE, "layers": 2, "width": 32, "head_width": 16}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FLEXIBLE = {**TOWER, "intermediate_size": 64, "patch_size": 8, "num_patches": 16}
SAM = {**SIZE, **TOWER, "output_channels": 16, "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 2}


def vision_model(model: Any) -> Any:
    """The vision tower of a model of two."""
    return model.vision_model


def mlcd(model: Any, images: Tensor) -> Pair:
    """MLCD's norm comes after the class token is taken."""
    outputs = model(images)
    return model.post_layernorm(outputs.last_hidden_state[:, 1:]), outputs.pooler_output


def sam(model: Any, images: Tensor) -> Pair:
    """SAM's map after its neck, of which nothing is pooled."""
    places = model(images).last_hidden_state.flatten(2).mT
    return places, places.mean(1)


HUGGING_FACE = [
    Family("CLIP", PROJECTED, saved("CLIPModel", "CLIPConfig", **two(projection_dim=12)), clip),
    Family("CLIP's vision tower", PROJECTED,
           saved("CLIPVisionModelWithProjection", "CLIPVisionConfig", **VISION, projection_dim=12), clip),
    Family("MetaCLIP 2", PROJECTED, saved("MetaClip2Model", "MetaClip2Config", **two(projection_dim=12)), clip),
    Family("AltCLIP", PROJECTED, saved("AltCLIPModel", "AltCLIPConfig", **two(projection_dim=12)), clip),
    Family("Chinese CLIP", PROJECTED, saved("ChineseCLIPModel", "ChineseCLIPConfig", **two(projection_dim=12)), clip),
    Family("OWL-ViT", PROJECTED, saved("OwlViTModel", "OwlViTConfig", **two(projection_dim=12)), clip),
    Family("BLIP", PROJECTED, saved("BlipModel", "BlipConfig", **two(projection_dim=12)), clip),
    Family("VisionTextDualEncoder", PROJECTED, save_dual(transformers.Dinov2Config(**DINO)), dual),
    Family("VisionTextDualEncoder with a tower of timm", PROJECTED,
           save_dual(transformers.TimmWrapperConfig(architecture="test_vit", hidden_size=64)), dual, size=160),
    Family("EVA-CLIP-8B", PROJECTED, save_evaclip("pre"), evaclip),
    Family("EVA-CLIP-18B", PROJECTED, save_evaclip("post"), evaclip),
    Family("SigLIP", NORMED, saved("SiglipModel", "SiglipConfig", **two()), tokens(0, vision_model)),
    Family("SigLIP 2", NORMED, saved("Siglip2Model", "Siglip2Config", **two(FLEXIBLE)), naflex),
    Family("AIMv2", NORMED, saved("Aimv2VisionModel", "Aimv2VisionConfig", **VISION), tokens(0), other_size=0),
    Family("TIPSv2", NORMED,
           saved("Tipsv2Model", "Tipsv2Config", **two(DINO, {**TEXT, "hidden_size": 32})), tokens(2, vision_model)),
    Family("DINOv2", NORMED, saved("Dinov2Model", "Dinov2Config", **DINO), tokens(1)),
    Family("DINOv2 with registers", NORMED,
           saved("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **DINO, num_register_tokens=3), tokens(4)),
    Family("DINOv3", NORMED, saved("DINOv3ViTModel", "DINOv3ViTConfig", **VISION, num_register_tokens=4), tokens(5)),
    Family("DINOv3 ConvNeXt", NORMED, saved("DINOv3ConvNextModel", "DINOv3ConvNextConfig", **PYRAMID), tokens(1),
           size=64, other_size=96),
    Family("Pixio", NORMED, saved("PixioModel", "PixioConfig", **DINO), tokens(8)),
    Family("I-JEPA", NORMED, saved("IJepaModel", "IJepaConfig", **VISION), unpooled(0)),
    Family("ViT", NORMED, saved("ViTModel", "ViTConfig", **VISION), tokens(1)),
    Family("DeiT", NORMED, saved("DeiTModel", "DeiTConfig", **VISION), tokens(2)),
    Family("ViT-MAE", NORMED, saved("ViTMAEModel", "ViTMAEConfig", **VISION), masked),
    Family("ViT-MSN", NORMED, saved("ViTMSNModel", "ViTMSNConfig", **VISION), unpooled(1)),
    Family("BEiT", NORMED, saved("BeitModel", "BeitConfig", **VISION), beit),
    Family("MLCD", NORMED, saved("MLCDVisionModel", "MLCDVisionConfig", **VISION), mlcd),
    Family("TimmWrapper", NORMED, saved("TimmWrapperModel", "TimmWrapperConfig", architecture="test_vit"), wrapped,
           size=160),
    Family("LLaVA's tower", NORMED, saved("LlavaModel", "LlavaConfig", vision_config=HEADLESS, text_config=LLAMA),
           lambda model, images: unpooled(0)(model.vision_tower, images)),
    Family("RADIO", BARE, saved("RadioModel", "RadioConfig", **{**DINO, "mlp_ratio": 2.0}, max_img_size=64), radio),
    Family("InternVL's tower", BARE, saved("InternVLVisionModel", "InternVLVisionConfig", **VISION), unpooled(1)),
    Family("InternViT-300M", BARE, save_internvit(large=False), internvit),
    Family("InternViT-6B in an InternVL", BARE, save_internvit(large=True), internvit),
    Family("Data2Vec", BARE, saved("Data2VecVisionModel", "Data2VecVisionConfig", **VISION), unpooled(1)),
    Family("ConvNeXt", PLACES, saved("ConvNextModel", "ConvNextConfig", **PYRAMID), maps("layernorm"), size=64,
           other_size=96),
    Family("ConvNeXt V2", PLACES, saved("ConvNextV2Model", "ConvNextV2Config", **PYRAMID), maps("layernorm"), size=64,
           other_size=96),
    Family("ResNet", PLACES,
           saved("ResNetModel", "ResNetConfig", hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], embedding_size=8),
           maps(), size=224, other_size=96),
    Family("Swin", PLACES, saved("SwinModel", "SwinConfig", **STAGES, patch_size=4, window_size=2), tokens(0), size=64,
           other_size=96),
    Family("Hiera", PLACES, saved("HieraModel", "HieraConfig", **{**STAGES, "image_size": [64, 64]}), rerolled, size=64,
           other_size=128),
    Family("SAM", PLACES, saved("SamVisionModel", "SamVisionConfig", **SAM), sam, other_size=0),
]  # fmt: skip
TIMM = [
    Family(name, target, save, expected, source="timm:local-dir:FOLDER", **sizes)
    for name, target, save, expected, sizes in (
        ("ViT", NORMED, saved_by_timm("vit_tiny_patch16_224", **TIMM_VIT, num_classes=5), timm_vit, {}),
        ("EVA-02", NORMED, saved_by_timm("eva02_tiny_patch14_224", **TIMM_VIT, num_classes=5), timm_vit, {}),
        ("CLIP", "`head(norm(patch))`",
         saved_by_timm("vit_base_patch32_clip_224.openai", **TIMM_VIT, num_classes=12), timm_clip, {}),
        ("ConvNeXt", "the last map", saved_by_timm("test_convnext", num_classes=5), timm_map, {"size": 160}),
    )
]  # fmt: skip
OPEN_CLIP = [
    Family(name, target, save, expected, source="open_clip:local-dir:FOLDER", **sizes)
    for name, target, save, expected, sizes in (
        ("ViT", "`ln_post(patch) @ proj`", saved_by_open_clip(**OPEN_CLIP_VIT), open_clip_vit, {}),
        ("CoCa", "the pool's values of `patch`, through `ln_post` and `proj`",
         saved_by_open_clip(coca=True, **OPEN_CLIP_VIT, attentional_pool=True, attn_pooler_heads=2), coca, {}),
        ("SigLIP", NORMED,
         saved_by_open_clip(timm_model_name="vit_pwee_patch16_reg1_gap_256", timm_pool="map", timm_proj="none",
                            image_size=256), attention_pooled, {"size": 256}),
        ("ConvNeXt", "each place of the last map through the head",
         saved_by_open_clip(timm_model_name="test_convnext", timm_pool="", timm_proj="linear", image_size=160),
         convnext, {"size": 160, "other_size": 64}),
        ("ResNet", "each place of the last map, through the pool's values",
         saved_by_open_clip(image_size=64, layers=[1, 1, 1, 1], width=8, patch_size=None), resnet,
         {"size": 64, "other_size": 96}),
    )
]  # fmt: skip
FAMILIES = [*HUGGING_FACE, *TIMM, *OPEN_CLIP]
