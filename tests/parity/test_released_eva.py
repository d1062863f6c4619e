"""Our towers against reference tensors of the released EVA code: outputs, losses and gradients.

Every file of the folder W2S_FIXTURES is read; towers are built from its metadata alone.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from w2s.checkpoint.eva_format import TEXT_NAMES, VISION_NAMES, from_eva, to_eva
from w2s.config.sections import ParallelConfig, TextConfig, VisionConfig
from w2s.megatron.initialize import assign, global_name
from w2s.megatron.tower import Tower
from w2s.objectives.contrastive import contrastive_loss
from w2s.objectives.masked import masked_cosine_loss
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.masked import MaskedStudent

FOLDER = Path(os.environ.get("W2S_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
FILES = sorted(FOLDER.glob("*.safetensors"))
TOLERANCE = 1e-5
"""Relative to the largest value of a tensor: sums of a few hundred float32 products differ by a few 1e-7 a layer."""

pytestmark = pytest.mark.skipif(not FILES, reason=f"no reference tensors in {FOLDER}")


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def vision_shape(metadata: dict[str, str]) -> VisionConfig:
    cfg: dict[str, Any] = json.loads(metadata["vision_cfg"])
    return VisionConfig(
        image_size=cfg["image_size"],
        patch_size=cfg["patch_size"],
        layers=cfg["layers"],
        width=cfg["width"],
        heads=cfg["width"] // cfg["head_width"],
        mlp_width=int(cfg["width"] * cfg["mlp_ratio"]),
        norm="rmsnorm" if cfg["use_rms_norm"] else "layernorm",
        norm_placement="post" if cfg["postnorm"] else "pre",
        qkv_bias=cfg["qkv_bias"],
    )


def text_shape(metadata: dict[str, str]) -> TextConfig:
    cfg: dict[str, Any] = json.loads(metadata["text_cfg"])
    return TextConfig(
        context_length=cfg["context_length"],
        vocab_size=cfg["vocab_size"],
        layers=cfg["layers"],
        width=cfg["width"],
        heads=cfg["heads"],
        mlp_width=4 * cfg["width"],
    )


def names_of(tower: Tower) -> list[str]:
    return [global_name(tower, name) for name, _ in tower.named_parameters()]


def fill_from(tower: Tower, released: dict[str, Tensor], names: dict[str, str]) -> None:
    own = [name for name in names_of(tower) if name != "logit_scale"]
    tensors = from_eva(released, own, names, tower.config.num_attention_heads)
    assign(tower, {**tensors, "logit_scale": released.get("logit_scale", torch.empty(0))})


def gradients(tower: Tower, names: dict[str, str]) -> dict[str, Tensor]:
    own = {global_name(tower, name): p.grad for name, p in tower.named_parameters()}
    return to_eva(own, names, tower.config.num_attention_heads)


def assert_close(name: str, ours: Tensor, theirs: Tensor, floor: float = 0.0) -> None:
    error = (ours.float() - theirs).abs().max() / max(float(theirs.abs().max()), floor)
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


def assert_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    # K's bias has no effect, so what the reference has for it is rounding noise: compare on the scale of all of them.
    scale = 1e-3 * max(float(value.abs().max()) for value in theirs.values())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_close(name, ours[name], value, floor=scale)


@pytest.mark.parametrize("path", [f for f in FILES if f.name.startswith("clip")], ids=lambda p: p.stem)
def test_clip(path: Path, alone: Any) -> None:
    metadata, tensors = read(path)
    state, out, images, texts = part(tensors, "state/"), part(tensors, "out/"), tensors["in/image"], tensors["in/text"]
    embed_dim = int(metadata["embed_dim"])
    vision = ImageTower(vision_shape(metadata), embed_dim, ParallelConfig(), torch.float32)
    text = TextTower(text_shape(metadata), embed_dim, ParallelConfig(), torch.float32)
    fill_from(vision, part(state, "visual."), VISION_NAMES)
    fill_from(text, {**part(state, "text."), "logit_scale": state["logit_scale"]}, TEXT_NAMES)

    image_features = F.normalize(vision(images), dim=-1)
    text_features = F.normalize(text(texts), dim=-1)
    loss = contrastive_loss(image_features, text_features, text.logit_scale.exp(), tile=4)
    loss.backward()

    assert_close("image features", vision(images), out["image_features"])
    assert_close("text features", text(texts), out["text_features"])
    assert_close("patch targets", vision.head(vision.encode(images))[:, 1:], out["patch_targets"])
    assert_close("loss", loss, out["clip_loss"])
    ours = {f"visual.{name}": value for name, value in gradients(vision, VISION_NAMES).items()}
    for name, value in gradients(text, TEXT_NAMES).items():
        ours[name if name == "logit_scale" else f"text.{name}"] = value
    assert_gradients(ours, part(tensors, "grad/"))


@pytest.mark.parametrize("path", [f for f in FILES if f.name.startswith("mim")], ids=lambda p: p.stem)
def test_masked_stage(path: Path, alone: Any) -> None:
    metadata, tensors = read(path)
    masks = tensors["in/mask"]
    rows = masks.flatten().nonzero().squeeze(1)
    student = MaskedStudent(vision_shape(metadata), int(metadata["teacher_dim"]), ParallelConfig(), torch.float32)
    fill_from(student, part(tensors, "state/"), VISION_NAMES)

    predictions = student(tensors["in/image"], masks, rows)
    loss = masked_cosine_loss(predictions, tensors["in/targets"].flatten(0, 1)[rows])
    loss.backward()

    assert_close("predictions", predictions, tensors["out/pred_masked"])
    assert_close("loss", loss, tensors["out/mim_loss"])
    assert_gradients(gradients(student, VISION_NAMES), part(tensors, "grad/"))
