"""ViT teachers: patch tokens after norm and projection, weights from files, errors."""

import json

import open_clip
import pytest
import timm
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import nn

from w2s.config.sections import TeacherConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.teachers.base import Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.networks.open_clip_vit import OpenClipTokens
from w2s.teachers.networks.timm_vit import TimmTokens

WRAPPER = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None, "image_size": 160},
    "text_cfg": {},
}


def build(source, grid=4, **settings):
    return build_teacher(TeacherConfig(source=source, **settings), grid=grid, device="cpu")


def small_eva(**settings):
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 12}
    return Eva(**shape, global_pool="token", use_post_norm=True, **settings).eval()


def small_open_clip(image_size=32):
    torch.manual_seed(0)
    return VisionTransformer(image_size, 8, width=32, layers=2, heads=2, mlp_ratio=4, output_dim=12).eval()


@pytest.fixture
def wrapper(monkeypatch):
    """An open_clip model whose vision tower is a small timm ViT with the projection as its head."""
    monkeypatch.setattr(open_clip, "list_models", lambda: ["wrapper"])
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: {**WRAPPER, "vision_cfg": {**WRAPPER["vision_cfg"]}}
    )


@torch.no_grad()
def test_timm_eva_applies_its_head_to_each_patch_token():
    model, images = small_eva(), torch.randn(2, 3, 32, 32)
    teacher = TimmTokens(model, model.head, mean=[0.5] * 3, std=[0.5] * 3)
    tokens = model.forward_features(images)
    # timm's own head takes the first token: hand it every patch token in that place
    expected = torch.stack([model.forward_head(tokens[:, place:]) for place in range(1, 17)], 1)
    torch.testing.assert_close(teacher(images).patches, expected)
    assert (teacher.width, teacher.grid, teacher.image_size) == (12, 4, 32)


@torch.no_grad()
def test_open_clip_norms_and_projects_each_patch_token():
    model, images = small_open_clip(), torch.randn(2, 3, 32, 32)
    teacher = OpenClipTokens(model, mean=[0.5] * 3, std=[0.5] * 3)
    features = teacher(images).patches
    model.output_tokens = True
    pooled, tokens = model(images)
    torch.testing.assert_close(features, tokens @ model.proj)
    torch.testing.assert_close(teacher(images).summary, pooled)
    assert (teacher.width, teacher.grid, teacher.image_size) == (12, 4, 32)


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


def test_classifier_of_a_timm_model_is_left_out(tmp_path):
    torch.manual_seed(1)
    model = timm.create_model("test_vit").eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    teacher = build(f"timm:test_vit@{tmp_path / 'vit.safetensors'}", grid=10)
    images = torch.randn(1, 3, 160, 160)
    tokens = model.forward_features(images).detach()
    torch.testing.assert_close(teacher(images).patches, tokens[:, 1:])
    torch.testing.assert_close(teacher(images).summary, model.forward_head(tokens, pre_logits=True).detach())
    assert teacher.width == model.num_features == 64


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


@torch.no_grad()
def test_attention_pools_the_tokens_of_a_siglip_before_its_projection(wrapper, monkeypatch, tmp_path):
    vision = {"timm_model_name": "vit_pwee_patch16_reg1_gap_256", "timm_pool": "map", "image_size": 256}
    config = {**WRAPPER, "vision_cfg": {**WRAPPER["vision_cfg"], **vision}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {**config, "vision_cfg": {**config["vision_cfg"]}})
    clip = open_clip.CLIP(24, config["vision_cfg"], {"context_length": 4, "vocab_size": 9, "layers": 1}).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    teacher, images = build(f"open_clip:wrapper@{tmp_path / 'clip.pt'}", grid=16), torch.randn(2, 3, 256, 256)
    torch.testing.assert_close(teacher(images).summary, clip.encode_image(images))
    assert (teacher.width, teacher.summary_width) == (clip.visual.trunk.num_features, 24)


@pytest.mark.parametrize("kind", ["timm", "open_clip", "eva"])
@torch.no_grad()
def test_tokens_after_a_layer_are_what_the_next_one_reads(kind):
    trunk = (
        small_open_clip() if kind == "open_clip" else small_eva() if kind == "eva" else timm.create_model("test_vit")
    )
    wrap = OpenClipTokens(trunk, mean=[0.5] * 3, std=[0.5] * 3) if kind == "open_clip" else None
    network = wrap or TimmTokens(trunk, nn.Identity(), mean=[0.5] * 3, std=[0.5] * 3)
    teacher = Teacher(network, grid=network.grid)
    teacher.check_layers([0, 1], "mim.layers")
    read = []
    blocks = trunk.transformer.resblocks if kind == "open_clip" else trunk.blocks
    blocks[1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    images = torch.randn(2, 3, network.image_size, network.image_size)
    plain, asked = teacher(images), teacher(images, [1, 0])
    for with_layers, without in zip(asked[:2], plain[:2], strict=True):
        assert torch.equal(with_layers, without)
    assert torch.equal(asked.layers[1], read[-1][:, 1:])
    assert asked.layers[0].shape == (2, network.grid**2, network.layer_width)
    with pytest.raises(ConfigError, match=f"mim.layers: the teacher has no layer {network.depth}, its layers are 0 to"):
        teacher.check_layers([network.depth], "mim.layers")


def test_an_image_size_that_does_not_suit_a_model():
    with pytest.raises(ConfigError, match=r"teacher\.image_size=100 does not suit mixer_s32_224") as error:
        build("timm:mixer_s32_224", image_size=100)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_released_eva_names_are_read():
    """EVA-CLIP's own files name the tower `visual.*`: timm's conversion, which every file goes through, maps them."""
    model, copy, images = small_eva(), small_eva(qkv_bias=True), torch.randn(1, 3, 32, 32)
    copy.head.weight.zero_()
    released = {f"visual.{name}": value for name, value in model.state_dict().items()} | {"text.x": torch.zeros(1)}
    copy.load_state_dict(checkpoint_filter_fn(released, copy))
    assert torch.equal(copy(images), model(images))


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
    torch.save(small_open_clip().state_dict(), other)
    for source in ("timm:test_vit", "open_clip:ViT-S-32"):
        for file in (garbage, text, other):
            with pytest.raises(CheckpointError, match=f"{file} do not fit") as error:
                build(f"{source}@{file}")
            assert "\n" not in str(error.value)
    garbage.with_suffix(".safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="do not fit"):
        build(f"timm:test_vit@{garbage.with_suffix('.safetensors')}")
