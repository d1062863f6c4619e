"""Every kind of teacher that docs/teachers.md names, built small, beside its own modules."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")

from tests.teachers.networks.families import (  # noqa: E402
    DINO,
    FAMILIES,
    OPEN_CLIP_VIT,
    TEXT,
    VISION,
    Family,
    saved,
    saved_by_open_clip,
)
from w2s.config.sections import TeacherConfig  # noqa: E402
from w2s.errors import ConfigError, W2SError  # noqa: E402
from w2s.teachers.base import Teacher  # noqa: E402
from w2s.teachers.build import build_teacher, without_weights  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "teachers.md"
QUICK = {
    "hf": {"CLIP", "SigLIP 2", "DINOv3", "BEiT", "RADIO", "ConvNeXt V2", "EVA-CLIP-8B"},
    "open_clip": {"CoCa", "ViT", "SigLIP"},
    "timm": {"EVA-02", "CLIP", "ViT"},
}
"""Families of the default tests: one of each way to a feature."""
MODEL = ": use a model of timm:"


def kind_of(family: Family) -> str:
    return family.source.partition(":")[0]


def families() -> list:
    """All families; those that are not quick are marked as slow."""
    return [
        pytest.param(
            family,
            id=f"{kind_of(family)}-{family.name}",
            marks=[] if family.name in QUICK[kind_of(family)] else [pytest.mark.slow],
        )
        for family in FAMILIES
    ]


def build(source: str, image_size: int = 0, precision: str = "fp32") -> Teacher:
    config = TeacherConfig(source=source, image_size=image_size, precision=precision)
    return build_teacher(config, grid=4, device="cpu")


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_features_and_summary_are_the_models_own(family: Family, tmp_path: Path) -> None:
    model, images = family.save(tmp_path), torch.randn(2, 3, family.size, family.size)
    patches, summary = family.expected(model, images)
    source = family.source.replace("FOLDER", str(tmp_path))
    teacher = build(source)
    assert teacher.image_size == family.size
    features = teacher.network(images)
    # the same library on both sides
    torch.testing.assert_close(features.patches, patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.summary, summary, atol=1e-5, rtol=1e-5)
    network = teacher.network
    assert (network.grid**2, network.width, network.summary_width) == (*patches.shape[1:], summary.shape[1])
    if family.other_size:
        other = build(source, family.other_size)
        seen = other.network(torch.randn(1, 3, family.other_size, family.other_size))
        assert seen.patches.shape == (1, other.network.grid**2, network.width)
        assert other.network.grid != network.grid
    else:
        with pytest.raises(ConfigError, match=f"image_size={2 * family.size} does not suit .*; use {family.size}"):
            build(source, 2 * family.size)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_half_precision_is_read_and_computed(family: Family, tmp_path: Path) -> None:
    """Files in bfloat16 give what they hold, in float32 and at another size; bf16 arithmetic is near."""
    family.save(tmp_path)
    size = family.other_size or family.size
    source = family.source.replace("FOLDER", str(tmp_path))
    images = torch.randn(2, 3, size, size)
    exact = build(source, size)(images)
    halve(tmp_path)
    rounded, computed = build(source, size)(images), build(source, size, "bf16")(images)
    assert all(parameter.dtype == torch.float32 for parameter in build(source, size).parameters())
    for part in ("patches", "summary"):
        expected = getattr(exact, part)
        scale = expected.abs().max()
        # weights of 8 bits: 0.4 % each, which the layers of a random network may add up
        assert (getattr(rounded, part) - expected).abs().max() < 0.1 * scale
        assert (getattr(computed, part) - expected).abs().max() < 0.2 * scale


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_a_plan_needs_shapes_alone(family: Family, tmp_path: Path) -> None:
    family.save(tmp_path)
    config = TeacherConfig(source=family.source.replace("FOLDER", str(tmp_path)))
    network = without_weights(config, grid=4)
    images = torch.empty(2, 3, family.size, family.size, device="meta")
    features = network(images)
    assert features.patches.shape == (2, network.grid**2, network.width)
    assert features.summary.shape == (2, network.summary_width)


def halve(folder: Path) -> None:
    """Round the weights in a folder to bfloat16."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        state = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("family", families())
@torch.no_grad()
def test_tokens_after_a_layer_have_no_norm(family: Family, tmp_path: Path) -> None:
    family.save(tmp_path)
    teacher = build(family.source.replace("FOLDER", str(tmp_path)))
    depth = teacher.network.depth
    if not depth:
        with pytest.raises(ConfigError, match="choose a vision transformer"):
            teacher.check_layers([0], "mim.layers")
        return
    layers = next(m for m in teacher.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == depth)
    after: list[torch.Tensor] = []
    for layer in (layers[0], layers[-1]):
        layer.register_forward_hook(lambda _, inputs, out: after.append(out[0] if isinstance(out, tuple) else out))
    images = torch.randn(2, 3, family.size, family.size)
    first, last = teacher.network(images, [0, depth - 1]).layers
    places = teacher.network.grid**2
    assert torch.equal(first, after[0][:, -places:])
    assert torch.equal(last, after[1][:, -places:])


def describe(**settings: object) -> Callable[[Path], None]:
    """What writes a config.json alone."""
    return lambda folder: (folder / "config.json").write_text(json.dumps(settings))


NO_PATCHES = "is of the type KIND, which gives no features of an image's patches" + MODEL
NO_MAP = "tokens of 32 px, which are not a square map of patches; use a model of timm:"
GROUPS = {**VISION, "depths": [1, 1, 0], "num_group_tokens": [9, 8, 0], "num_output_groups": [9, 8, 0]}
DINOV2 = saved("Dinov2Model", "Dinov2Config", **DINO)

REFUSED = {
    "code of its own": (
        "hf:FOLDER", describe(model_type="new_vit", auto_map={"AutoModel": "modeling_new.NewViT"}),
        "is of the type new_vit, which transformers .* does not have: install a newer one, or use a model of timm:",
    ),
    "EVA-02's code": (
        "hf:FOLDER", describe(architectures=["EvaCLIPModel"], vision_config={"use_rope": True}),
        "has use_rope=true, use timm:eva02_…_clip_…@FILE instead",
    ),
    "a text model": ("hf:FOLDER", describe(model_type="bert"), NO_PATCHES.replace("KIND", "bert")),
    "a detector": ("hf:FOLDER", describe(model_type="detr"), NO_PATCHES.replace("KIND", "detr")),
    "tokens of detections": (
        "hf:FOLDER", saved("YolosModel", "YolosConfig", **{**VISION, "image_size": [32, 32]}), NO_MAP
    ),
    "groups of patches": (
        "hf:FOLDER", saved("GroupViTModel", "GroupViTConfig", text_config=TEXT, vision_config=GROUPS), NO_MAP
    ),
    "images in one row": ("hf:FOLDER", saved("PixtralVisionModel", "PixtralVisionConfig", **VISION), NO_MAP),
    "clips": ("hf:FOLDER", saved("VideoMAEModel", "VideoMAEConfig", **VISION), "gives no features of an image.*timm:"),
    "a folder of open_clip": (
        "hf:FOLDER", lambda folder: (folder / "open_clip_config.json").touch(), "use open_clip:local-dir:FOLDER"
    ),
    "a run": ("hf:FOLDER", lambda folder: (folder / "meta.json").write_text("{}"), "use w2s:FOLDER"),
    "a folder of transformers at open_clip:": ("open_clip:local-dir:FOLDER", DINOV2, "cannot be read: use hf:FOLDER"),
    "a folder of transformers at timm:": ("timm:local-dir:FOLDER", DINOV2, "no model of timm: use hf:FOLDER"),
    "CoCa with a pool of its own for the contrast": (
        "open_clip:local-dir:FOLDER",
        saved_by_open_clip(coca=True, **OPEN_CLIP_VIT, attentional_pool="parallel", attn_pooler_heads=2),
        "pools by attention twice: use a CoCa with attentional_pool=true",
    ),
    "a name of a hub": ("timm:hf-hub:timm/test_vit", lambda folder: None, "fetch it and give timm:local-dir:FOLDER"),
}  # fmt: skip
"""What is not a teacher: its source, what writes it, and the way that it is told."""


@pytest.mark.parametrize("name", [*REFUSED])
def test_what_is_no_teacher_is_told_the_way(name: str, tmp_path: Path) -> None:
    source, write, message = REFUSED[name]
    write(tmp_path)
    given = source.replace("FOLDER", str(tmp_path))
    with pytest.raises(
        W2SError, match=message if given == source else message.replace("FOLDER", str(tmp_path))
    ) as error:
        build(given)
    assert "\n" not in str(error.value)


def test_the_page_of_teachers_has_a_row_of_each_way_to_a_feature() -> None:
    ways: dict[tuple[str, str], list[str]] = {}
    for family in FAMILIES:
        ways.setdefault((family.source, family.target), []).append(family.name)
    table = PAGE.read_text(encoding="utf-8")
    for (source, target), names in ways.items():
        row = f"| `{source}` | {', '.join(names)} | {target} |"
        assert row in table, f"docs/teachers.md lacks the row\n{row}"
