"""Folders of transformers as teachers, written by transformers itself; `test_families.py` has the kinds of model."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")

from tests.teachers.networks.families import VISION, saved, two  # noqa: E402
from w2s.config.sections import TeacherConfig  # noqa: E402
from w2s.errors import CheckpointError, ConfigError  # noqa: E402
from w2s.teachers.base import Teacher  # noqa: E402
from w2s.teachers.build import build_teacher  # noqa: E402


def build(folder: Path, **settings: int) -> Teacher:
    return build_teacher(TeacherConfig(source=f"hf:{folder}", **settings), grid=4, device="cpu")


@torch.no_grad()
def test_a_siglip_without_its_head_has_the_mean_as_its_summary(tmp_path: Path) -> None:
    saved("SiglipVisionModel", "SiglipVisionConfig", **VISION, vision_use_head=False)(tmp_path)
    features = build(tmp_path)(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features.summary, features.patches.mean(1))


@torch.no_grad()
def test_a_classifier_is_published_without_a_pooler(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = saved("ViTForImageClassification", "ViTConfig", **VISION)(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    capfd.readouterr()
    tokens, features = model.vit(images).last_hidden_state, build(tmp_path)(images)
    assert "MISSING" not in capfd.readouterr().err
    torch.testing.assert_close(features.patches, tokens[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, tokens[:, 0], atol=1e-5, rtol=1e-5)  # what the classifier reads


def test_a_clips_text_tower_may_be_missing_but_not_its_layers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("CLIPModel", "CLIPConfig", **two(projection_dim=12))(tmp_path)
    file = tmp_path / "model.safetensors"
    vision = {name: value for name, value in load_file(file).items() if not name.startswith("text_model.")}
    save_file(vision, file, {"format": "pt"})
    assert build(tmp_path).width == 12
    del vision["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(vision, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lack vision_model\.encoder\.layers\.1\.mlp\.fc1\.weight: fetch the whole"
    ):
        build(tmp_path)


def test_the_folders_own_mean_and_std(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved("SiglipModel", "SiglipConfig", **two())(tmp_path)
    assert build(tmp_path).mean == (0.5, 0.5, 0.5)
    assert "has no preprocessor_config.json: its images get mean [0.5, 0.5, 0.5]" in caplog.text
    known = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": known}))
    teacher = build(tmp_path)
    assert (teacher.mean, teacher.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**known, "do_normalize": False}))
    teacher = build(tmp_path)
    assert (teacher.mean, teacher.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_the_size_of_a_model_that_does_not_say_it_is_that_of_its_preprocessing(tmp_path: Path) -> None:
    shape = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "embedding_size": 8}
    saved("ResNetModel", "ResNetConfig", **shape)(tmp_path)
    preprocessing = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    assert build(tmp_path).image_size == 64
    del preprocessing["crop_size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    assert build(tmp_path).image_size == 72


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: give a model's folder on disk"):
        build(tmp_path)
    saved("CLIPVisionModel", "CLIPVisionConfig", **VISION)(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.image_size=30 is not a multiple .* use 32"):
        build(tmp_path, image_size=30)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(CheckpointError) as error:
        build(tmp_path)
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=r"do not fit clip_vision_model, give the file of this model: .*no file named"
    ):
        build(tmp_path)
