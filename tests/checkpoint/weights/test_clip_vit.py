"""A CLIP's own vision transformer: from open_clip's weights into our towers, and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor

from tests.checkpoint.peers import captions, images, model_of, open_clip_config, released, stir
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.starts.growth import Growth
from w2s.checkpoint.starts.handover import hand_over
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.load import load
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.megatron.parallel import process_groups
from w2s.teachers.networks.eva_vit import w2s_run
from w2s.towers.build import build_clip


def vit(activation: Any) -> ModelConfig:
    model = model_of("vit")
    vision, text = (replace(tower, activation=activation) for tower in (model.vision, model.text))
    return replace(model, vision=vision, text=text)


def peer_of(model: ModelConfig) -> open_clip.CLIP:
    clip = open_clip.CLIP(**open_clip_config(model), quick_gelu=model.vision.activation == "quick_gelu")
    stir(clip, 5)
    return clip


@pytest.mark.parametrize("activation", [pytest.param("gelu", marks=pytest.mark.slow), "quick_gelu"])
def test_open_clips_weights_come_in_and_go_out_again(tmp_path: Path, activation: str) -> None:
    model = vit(activation)
    peer = peer_of(model)
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "checkpoint")
    assert (found.missing, found.unexpected, found.resized) == ([], [], [])
    export_checkpoint(tmp_path / "checkpoint", "open_clip", tmp_path / "exported")
    (tmp_path / "exported").rename(tmp_path / "moved")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'moved'}")
    for name, value in again.visual.state_dict().items():
        assert torch.equal(value, peer.visual.state_dict()[name])
    with torch.no_grad():
        seen, read = peer.encode_image(images(model)), peer.encode_text(captions(model))
        assert torch.equal(again.eval().encode_image(images(model)), seen)
        assert torch.equal(again.encode_text(captions(model)), read)
        ours = _towers(model, tmp_path / "clip.pt")
        teacher = w2s_run(tmp_path / "checkpoint", image_size=0, precision="fp32")(images(model))
    # float32 in another attention kernel and order of sums
    torch.testing.assert_close(ours[0], seen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], read, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(teacher.summary, seen, atol=1e-5, rtol=1e-5)


def _towers(model: ModelConfig, file: Path) -> tuple[Tensor, Tensor]:
    """What our towers give that take a file over without a conversion."""
    config = replace(load("clip", ["model=tiny", "hardware=cpu"]), model=model)
    with process_groups.init_distributed(config.parallel, config.hardware):
        vision, text = build_clip(config, torch.float32, torch.device("cpu"))
        assert hand_over(vision, "vision", file).new == []
        assert hand_over(text, "text", file).new == []
        return vision.chunks[0](images(model)), text.chunks[0](captions(model))


def test_timm_has_the_tower_too(tmp_path: Path) -> None:
    model = vit("quick_gelu")
    peer = peer_of(model)
    torch.save(peer.state_dict(), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", "timm", tmp_path / "timm")
    tower = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(tower(images(model)), peer.encode_image(images(model)), atol=1e-5, rtol=1e-5)


def test_a_masked_stage_grows_out_of_it(tmp_path: Path) -> None:
    """Twice as wide it is the same function."""
    model = vit("gelu")
    peer = peer_of(model)
    torch.save(peer.state_dict(), tmp_path / "clip.pt")
    wide = replace(model.vision, width=64, heads=4, mlp_width=256)
    config = replace(load("clip", ["model=tiny", "hardware=cpu"]), model=replace(model, vision=wide))
    with process_groups.init_distributed(config.parallel, config.hardware), torch.no_grad():
        vision, _ = build_clip(config, torch.float32, torch.device("cpu"))
        hand_over(vision, "vision", tmp_path / "clip.pt", growth=Growth("none", "copy", seed=0))
        seen = vision.chunks[0](images(model))
    torch.testing.assert_close(seen, peer.encode_image(images(model)), atol=1e-5, rtol=1e-5)


def test_what_does_not_go_together_is_one_line(tmp_path: Path) -> None:
    mixed = replace(vit("gelu"), vision=vit("quick_gelu").vision)
    torch.save(released(mixed), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", mixed, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"quick_gelu in its vision tower and gelu.*use --format transformers"):
        export_checkpoint(tmp_path / "checkpoint", "open_clip", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"of model\.vision\.kind=clip, which EVA-CLIP's code does not have"):
        export_checkpoint(tmp_path / "checkpoint", "eva", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"does not hold the model small-vit: .*linear_fc1"):
        torch.save(released(model_of("g")), tmp_path / "g.pt")
        import_checkpoint(tmp_path / "g.pt", vit("gelu"), tmp_path / "no")
    with pytest.raises(ConfigError, match=r"model\.vision\.kind=clip has norm=layernorm, .*: set all three"):
        load("clip", ["model=tiny", "model.vision.kind=clip"])
    with pytest.raises(
        ConfigError, match=r"activation=quick_gelu is not of model\.vision\.kind=eva: use gelu, or another kind"
    ):
        load("clip", ["model=tiny", "model.vision.activation=quick_gelu"])
