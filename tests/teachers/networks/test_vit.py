"""Teachers of timm and open_clip: weights from files, sizes, errors; `test_families.py` has the kinds of model."""

import json

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.build import build_teacher

WRAPPER = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
    "text_cfg": {},
}


def build(source, grid=4, **settings):
    return build_teacher(TeacherConfig(source=source, **settings), grid=grid, device="cpu")


@pytest.fixture
def wrapper(monkeypatch):
    """An open_clip model whose vision tower is a small timm ViT with the projection as its head."""
    monkeypatch.setattr(open_clip, "list_models", lambda: ["wrapper"])
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: {**WRAPPER, "vision_cfg": {**WRAPPER["vision_cfg"]}}
    )


@torch.no_grad()
def test_open_clip_wrapper_of_timm(wrapper, tmp_path):
    torch.manual_seed(1)
    clip = open_clip.CLIP(24, WRAPPER["vision_cfg"], {"context_length": 4, "vocab_size": 9, "layers": 1}).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    teacher = build(f"open_clip:wrapper@{tmp_path / 'clip.pt'}", grid=10)
    trunk, images = clip.visual.trunk, torch.randn(2, 3, 160, 160)
    tokens = trunk.forward_features(images)
    expected = torch.stack([trunk.forward_head(tokens[:, place:]) for place in range(1, 101)], 1)
    torch.testing.assert_close(teacher(images).patches, expected)
    torch.testing.assert_close(teacher(images).summary, clip.encode_image(images))
    assert (teacher.width, teacher.summary_width) == (24, 24)


def test_another_size_may_give_a_feature_per_student_patch():
    teacher = build("timm:test_vit", grid=3, image_size=48)
    assert teacher.network.grid == 3
    assert teacher(torch.randn(1, 3, 48, 48)).patches.shape == (1, 9, 64)


def test_by_itself_a_teacher_sees_its_own_size_and_is_resampled_onto_the_student_grid(caplog):
    with caplog.at_level("INFO"):
        teacher = build("timm:test_vit", grid=3)
    assert teacher.image_size == 160
    assert teacher.network.grid == 10
    assert "sees 160 px: its 10x10 features are resampled onto the student's 3x3 patches" in caplog.text
    images = torch.randn(1, 3, 160, 160)
    whole = teacher.network(images).patches.unflatten(1, (10, 10)).movedim(-1, 1)
    expected = torch.nn.functional.interpolate(whole, (3, 3), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(teacher(images).patches, expected.detach())


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
@torch.no_grad()
def test_a_folder_of_several_files(wrapper, kind, tmp_path):
    torch.manual_seed(1)
    clip = open_clip.CLIP(24, WRAPPER["vision_cfg"], {"context_length": 4, "vocab_size": 9, "layers": 1}).eval()
    model = clip if kind == "open_clip" else timm.create_model("test_vit").eval()
    state = model.state_dict()
    for part in (0, 1):
        half = dict(list(state.items())[part::2])
        save_file(half, tmp_path / f"model-{part}.safetensors")
    names = {name: f"model-{place % 2}.safetensors" for place, name in enumerate(state)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    teacher = build(f"{kind}:{'wrapper' if kind == 'open_clip' else 'test_vit'}@{tmp_path}")
    images = torch.randn(2, 3, 160, 160)
    trunk = model.visual.trunk if kind == "open_clip" else model
    expected = clip.encode_image(images) if kind == "open_clip" else trunk.forward_features(images)[:, 0]
    torch.testing.assert_close(teacher(images).summary, expected)


def test_positions_of_a_file_are_resampled(tmp_path):
    torch.manual_seed(1)
    config = open_clip.get_model_config("ViT-S-32")
    clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], {"layers": 1, "width": 64, "heads": 1})
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    teacher = build(f"open_clip:ViT-S-32@{tmp_path / 'clip.pt'}", grid=4, image_size=128)
    assert teacher.image_size == 128
    assert torch.equal(teacher.network.visual.positional_embedding[0], clip.visual.positional_embedding[0])
    assert torch.equal(teacher.network.visual.conv1.weight, clip.visual.conv1.weight)
    assert teacher(torch.randn(1, 3, 128, 128)).patches.shape == (1, 16, 384)


@pytest.mark.parametrize(("name", "grid"), [("test_resnet", 5), ("test_mambaout", 5), ("mixer_s32_224", 7)])
@torch.no_grad()
def test_any_other_timm_model_gives_its_last_map(name, grid, tmp_path):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    teacher = build(f"timm:{name}@{tmp_path / 'weights.safetensors'}", grid=grid)
    images = torch.randn(2, 3, teacher.image_size, teacher.image_size)
    assert (teacher.network.grid, teacher.width) == (grid, model.num_features)
    maps = model.forward_features(images)  # [n, c, h, w], [n, h, w, c] or [n, tokens, c]
    expected = {"test_resnet": lambda: maps.flatten(2).mT, "test_mambaout": lambda: maps.flatten(1, 2)}
    torch.testing.assert_close(teacher(images).patches, expected.get(name, lambda: maps)())
    summary = model.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(teacher(images).summary, summary)
    assert teacher.summary_width == summary.shape[1]
    with pytest.raises(ConfigError, match="the layers of this teacher give no tokens, choose a vision transformer"):
        teacher.check_layers([0], "mim.layers")


def test_an_image_size_that_does_not_suit_a_model():
    with pytest.raises(ConfigError, match=r"teacher\.image_size=100 does not suit mixer_s32_224") as error:
        build("timm:mixer_s32_224", image_size=100)
    assert "\n" not in str(error.value)


def test_random_weights_are_equal_and_leave_the_generator_alone(caplog):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = build("timm:test_vit")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = build("timm:test_vit")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert "weights are random" in caplog.text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("efficientnet_lite", "efficientnet_lite is not a teacher: use efficientnet_lite[02]"),
        ("tim:test_vit", "use timm:MODEL"),
        ("huggingface:x", "use efficientnet_lite0 or efficientnet_lite2 or timm"),
        ("eva:", r"use eva:MODEL\[@FILE\]"),
        ("w2s:latest", "give the run's name"),
        ("timm", "use timm:MODEL"),
        ("timm:vit_tiny_patch16_225", "nearest are vit_tiny_patch16_224"),
        ("timm:test_vit.in1k", r"nearest are test_vit\.r160_in1k"),
        ("open_clip:ViT-S-33", "nearest are ViT-S-32"),
    ],
)
def test_wrong_names_are_told_the_nearest(source, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(source)
    assert "\n" not in str(error.value)


def test_wrong_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"nope\.pt do not exist .* teacher.source=timm:test_vit@FILE"):
        build("timm:test_vit@nope.pt")
    garbage, text, other = tmp_path / "garbage.pt", tmp_path / "text.pt", tmp_path / "other.pt"
    garbage.write_bytes(b"not weights")
    text.write_bytes(b"a photo of a cat\n")  # begins as a pickle that takes from an empty stack
    torch.save({"class_embedding": torch.zeros(32)}, other)
    for source in ("timm:test_vit", "open_clip:ViT-S-32"):
        for file in (garbage, text, other):
            with pytest.raises(CheckpointError, match=f"{file} do not fit") as error:
                build(f"{source}@{file}")
            assert "\n" not in str(error.value)
    garbage.with_suffix(".safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="do not fit"):
        build(f"timm:test_vit@{garbage.with_suffix('.safetensors')}")
