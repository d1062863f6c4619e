from pathlib import Path

import pytest

from w2s.bench.depth import reduced
from w2s.config.load import load, named_model
from w2s.errors import ConfigError


def test_every_tower_becomes_as_much_shallower(tmp_path: Path) -> None:
    config = load("mim", ["model=eva_18b", "teacher=eva02_clip_e_plus"])
    small = reduced(config, 4, tmp_path)
    assert (small.model.vision.layers, small.model.text.layers) == (4, 3)  # of 48 and 32
    assert small.model.vision.width == 5120
    kind, _, model = small.teacher.source.partition(":")
    assert kind == "eva"
    teacher = named_model(model)
    assert teacher.vision.layers == 5  # 64 x 4 / 48
    assert (teacher.vision.width, teacher.embed_dim) == (1792, 1024)
    assert config.model.vision.layers == 48


def test_no_teacher_needs_its_weights(tmp_path: Path) -> None:
    for given, source in (
        ("eva:eva02_e_plus@nowhere.pt", "eva:eva02_e_plus"),
        ("timm:test_vit@nowhere.safetensors", "timm:test_vit"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32"),
        ("w2s:a-run", "w2s:a-run"),
    ):
        config = load("mim", ["model=tiny", f"teacher.source={given}"])
        assert reduced(config, None, tmp_path).teacher.source == source


def test_a_teacher_of_the_contrastive_stage_is_there_in_every_step(tmp_path: Path) -> None:
    keys = ["clip.distill.source=eva:eva02_e_plus@nowhere.pt", "clip.distill.until=0.1", "clip.distill.kind=both"]
    small = reduced(load("clip", ["model=eva_18b", *keys]), 4, tmp_path)
    teacher = named_model(small.stage_teachers[0].source.partition(":")[2])
    assert (teacher.vision.layers, teacher.text.layers) == (5, 3)
    assert small.teacher_steps == small.train.steps
    assert small.clip.distill.kind == "both"


def test_a_tower_does_not_grow(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layers 3: the vision tower has 2 layers"):
        reduced(load("mim", ["model=tiny"]), 3, tmp_path)
