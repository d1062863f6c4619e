"""open_clip's convolutional towers as teachers, beside open_clip's own forward pass."""

import copy

import open_clip
import pytest
import timm
import torch

from w2s.config.sections import TeacherConfig
from w2s.errors import ConfigError
from w2s.teachers.build import build_teacher

TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
SMALL = {
    "small_resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "small_swin": {
        "timm_model_name": "swin_tiny_patch4_window7_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224
    },
    "small_relpos": {"timm_model_name": "test_vit_relpos", "timm_pool": "", "timm_proj": "mlp", "image_size": 160},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """Kinds of tower whose published models are large."""
    published, known = open_clip.get_model_config, open_clip.list_models()
    monkeypatch.setattr(open_clip, "list_models", lambda: [*known, *SMALL])
    monkeypatch.setattr(
        open_clip,
        "get_model_config",
        lambda name: (
            {"embed_dim": 24, "vision_cfg": dict(SMALL[name]), "text_cfg": TEXT} if name in SMALL else published(name)
        ),
    )


def teacher_and_peer(name, folder, image_size=0):
    """A teacher from a file of random weights, and open_clip's tower that wrote the file."""
    if name == "small_relpos" and not timm.is_model("test_vit_relpos"):
        pytest.skip("timm has a small one since 1.0.31")
    torch.manual_seed(1)
    config = open_clip.get_model_config(name)
    model = open_clip.CLIP(config["embed_dim"], {**config["vision_cfg"], "timm_model_pretrained": False}, TEXT).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # open_clip begins its ResNet with zeros
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save({"state_dict": model.state_dict()}, folder / "clip.pt")
    source = f"open_clip:{name}@{folder / 'clip.pt'}"
    return build_teacher(TeacherConfig(source=source, image_size=image_size), grid=2, device="cpu"), model.visual


@pytest.mark.parametrize("name", ["convnext_tiny", "MobileCLIP2-S0"])
@torch.no_grad()
def test_of_an_image_of_one_place_the_feature_is_that_of_open_clip(name, tmp_path):
    teacher, visual = teacher_and_peer(name, tmp_path, 32)
    images = torch.randn(2, 3, 32, 32)
    features, expected = teacher.network(images), visual(images)
    torch.testing.assert_close(features.patches, expected[:, None], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, expected, atol=1e-5, rtol=1e-5)
    assert teacher.width == expected.shape[-1] == open_clip.get_model_config(name)["embed_dim"]


def convnext(visual, images):
    places = visual.trunk.head.norm(visual.trunk.forward_features(images)).flatten(2).mT
    return visual.head.proj(places)


def channels_last(visual, images):
    return visual.head.proj(visual.trunk.forward_features(images).flatten(1, 2))


def tokens(visual, images):
    trunk = visual.trunk
    return visual.head.mlp(trunk.fc_norm(trunk.forward_features(images)[:, trunk.num_prefix_tokens :]))


@pytest.mark.parametrize(
    ("name", "size", "by_hand"),
    [("convnext_tiny", 64, convnext), ("small_swin", 224, channels_last), ("small_relpos", 160, tokens)],
)
@torch.no_grad()
def test_each_place_goes_through_the_head_and_the_summary_is_the_embedding(name, size, by_hand, tmp_path):
    teacher, visual = teacher_and_peer(name, tmp_path, size)
    images = torch.randn(2, 3, size, size)
    features = teacher.network(images)
    # the same library on both sides
    torch.testing.assert_close(features.patches, by_hand(visual, images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, visual(images), atol=1e-5, rtol=1e-5)
    assert teacher.summary_width == teacher.width == features.summary.shape[1]


@torch.no_grad()
def test_a_resnet_gives_what_its_pool_makes_of_each_place_alone(tmp_path):
    teacher, visual = teacher_and_peer("small_resnet", tmp_path)
    images = torch.randn(2, 3, 64, 64)
    alone = copy.deepcopy(visual.attnpool)
    alone.positional_embedding = torch.nn.Parameter(torch.zeros(2, 256))  # of the mean and of the one place
    maps = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    places = [maps[:, :, row : row + 1, column : column + 1] for row in range(2) for column in range(2)]
    torch.testing.assert_close(
        teacher(images).patches, torch.stack([alone(place) for place in places], 1), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(teacher(images).summary, visual(images), atol=1e-5, rtol=1e-5)
    assert (teacher.network.grid, teacher.width) == (2, 24)


def test_a_resnet_takes_any_multiple_of_its_stride():
    teacher = build_teacher(TeacherConfig(source="open_clip:RN50", image_size=96), grid=3, device="cpu")
    features = teacher(torch.randn(1, 3, 96, 96))
    assert (features.patches.shape, features.summary.shape) == ((1, 9, 1024), (1, 1024))
    with pytest.raises(ConfigError, match=r"teacher\.image_size=100 is not a multiple of its patch size 32: use 96"):
        build_teacher(TeacherConfig(source="open_clip:RN50", image_size=100), grid=3, device="cpu")
