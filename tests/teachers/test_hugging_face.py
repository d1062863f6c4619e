"""Folders of transformers as teachers, written by transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.base import Teacher
from w2s.teachers.build import build_teacher

transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 50,
    "max_position_embeddings": 8,
}  # fmt: skip
DINO = {"mlp_ratio": 2, **{name: value for name, value in VISION.items() if name != "intermediate_size"}}


def save(kind: str, folder: Path) -> Any:
    """A small model of a kind with random weights, in a folder; returns it."""
    torch.manual_seed(0)
    match kind:
        case "clip":
            config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=12)
            model = transformers.CLIPModel(config)
        case "siglip":
            model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT))
        case "dinov2":
            model = transformers.Dinov2Model(transformers.Dinov2Config(**DINO))
        case _:
            config = transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
            model = transformers.Dinov2WithRegistersModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def features_of(kind: str, model: Any, images: Tensor) -> Tensor:
    """The model's own way from an image to a vector, taken for every patch token instead of the pooled one."""
    if kind == "clip":
        tower = model.vision_model
        hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(tower.embeddings(images))).last_hidden_state
        return model.visual_projection(tower.post_layernorm(hidden))[:, 1:]
    if kind == "siglip":
        tower = model.vision_model
        return tower.post_layernorm(tower.encoder(inputs_embeds=tower.embeddings(images)).last_hidden_state)
    hidden = model(images, output_hidden_states=True).hidden_states[-1]
    return model.layernorm(hidden)[:, {"dinov2": 1, "dinov2_with_registers": 4}[kind] :]


def build(folder: Path, grid: int = 4, **settings: int) -> Teacher:
    return build_teacher(TeacherConfig(source=f"hf:{folder}", **settings), grid=grid, device="cpu")


@pytest.mark.parametrize(
    ("kind", "width"), [("clip", 12), ("siglip", 32), ("dinov2", 32), ("dinov2_with_registers", 32)]
)
def test_features_are_the_models_own(tmp_path: Path, kind: str, width: int) -> None:
    model, images = save(kind, tmp_path), torch.randn(2, 3, 32, 32)
    teacher = build(tmp_path)
    assert (teacher.width, teacher.image_size, teacher.network.grid) == (width, 32, 4)
    # the same library on both sides
    torch.testing.assert_close(teacher(images).patches, features_of(kind, model, images), atol=1e-5, rtol=1e-5)
    larger = build(tmp_path, image_size=48)
    assert larger.network.grid == 6
    assert larger(torch.randn(1, 3, 48, 48)).patches.shape == (1, 16, width)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_the_summary_is_the_models_own_embedding(tmp_path: Path, kind: str) -> None:
    model, images = save(kind, tmp_path), torch.randn(2, 3, 32, 32)
    teacher = build(tmp_path)
    pooled = model(images) if "dino" in kind else model.get_image_features(images)
    expected = getattr(pooled, "pooler_output", pooled)  # a tensor before transformers 5
    # the same library on both sides
    torch.testing.assert_close(teacher(images).summary, expected, atol=1e-5, rtol=1e-5)
    assert teacher.summary_width == expected.shape[1]


@torch.no_grad()
def test_a_siglip_without_its_head_has_the_mean_as_its_summary(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path)
    features = build(tmp_path)(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features.summary, features.patches.mean(1))


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_tokens_after_a_layer_are_what_the_next_one_reads(tmp_path: Path, kind: str) -> None:
    save(kind, tmp_path)
    teacher, images = build(tmp_path), torch.randn(2, 3, 32, 32)
    read: list[Tensor] = []
    encoder = teacher.network.tower.encoder
    second = (encoder.layer if "dino" in kind else encoder.layers)[1]
    second.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    last, first = teacher(images, [1, 0]).layers
    assert torch.equal(first, read[0][:, teacher.network.prefix :])
    if kind == "clip":
        tokens = teacher.network.norm(last)
        torch.testing.assert_close(teacher.network.projection(tokens), teacher(images).patches)
    assert last.shape == first.shape == (2, 16, teacher.network.layer_width)
    assert not torch.equal(first, last)


def test_the_folders_own_mean_and_std(tmp_path: Path) -> None:
    save("siglip", tmp_path)
    assert build(tmp_path).mean == (0.5, 0.5, 0.5)
    known = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known))
    teacher = build(tmp_path)
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: give a folder of transformers"):
        build(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        ConfigError, match="is a bert, which gives no features of an image's patches: use a model of timm:"
    ):
        build(tmp_path)
    save("clip", tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.image_size=30 is not a multiple .* use 32"):
        build(tmp_path, image_size=30)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError) as error:
        build(tmp_path)
    assert "\n" not in str(error.value)
