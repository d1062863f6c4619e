"""SigLIP's vision transformer: from other people's weights into our tower, and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.ours import features
from tests.checkpoint.peers import images, masked_stage, model_of, released, stir, timm_tower
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.starts.growth import Growth
from w2s.checkpoint.starts.handover import hand_over
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.inspecting import inspect, known_models
from w2s.checkpoint.weights.released import rename
from w2s.checkpoint.weights.tensor_files import InMemory
from w2s.config.load import load
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError, ConfigError
from w2s.megatron.parallel import process_groups
from w2s.teachers.networks.eva_vit import w2s_run
from w2s.towers.build import build_clip

TEXT = {
    "context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2, "no_causal_mask": True,
    "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
}  # fmt: skip
"""The text tower of open_clip's SigLIPs, whose vision tower is timm's."""
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def siglip(activation: Any = "gelu") -> ModelConfig:
    model = model_of("siglip")
    return replace(model, vision=replace(model.vision, activation=activation))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> open_clip.CustomTextCLIP:
    """open_clip's SigLIP around a small tower of timm's."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **shape: create(name, **SIZES, **shape))
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    clip = open_clip.CustomTextCLIP(32, {**vision, "image_size": 32}, TEXT, init_logit_bias=-10)
    monkeypatch.undo()
    stir(clip, 5)
    return clip


def close(ours: Tensor, theirs: Tensor) -> None:
    # float32 in another attention kernel and order of sums
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def taken(model: ModelConfig, file: Path, growth: Growth | None = None) -> Tensor:
    """What our tower gives that takes a file over without a conversion."""
    config = replace(load("clip", ["model=tiny", "hardware=cpu"]), model=model)
    with process_groups.init_distributed(config.parallel, config.hardware), torch.no_grad():
        vision, _ = build_clip(config, torch.float32, torch.device("cpu"))
        assert hand_over(vision, "vision", file, **({"growth": growth} if growth else {})).new == []
        return vision.chunks[0](images(model_of("siglip")))


@torch.no_grad()
def test_open_clips_tower_comes_in_and_goes_out_again(tmp_path: Path, peer: open_clip.CustomTextCLIP) -> None:
    """Its text tower stays out: with one of ours beside it the export is a CLIP."""
    model, seen = siglip(), peer.encode_image(images(siglip()))
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "vision")
    assert (found.missing, found.resized) == ([], [])
    assert all(name.startswith(("text.", "logit_scale", "logit_bias")) for name in found.unexpected)
    assert inspect(tmp_path / "clip.pt")["text tower"] == "of another kind than w2s's"
    close(features(tmp_path / "vision", model, ["vision"]).images, seen)
    close(taken(model, tmp_path / "clip.pt"), seen)
    features_of_run = w2s_run(tmp_path / "vision", image_size=0, precision="fp32")(images(model))
    close(features_of_run.summary, seen)
    close(features_of_run.patches, peer.visual.trunk.forward_features(images(model)))
    whole = {**peer.state_dict(), **{n: v for n, v in released(model).items() if n.startswith("text.")}}
    whole = {name: value for name, value in whole.items() if not name.startswith(("text.text_projection.",))}
    torch.save(whole, tmp_path / "whole.pt")
    import_checkpoint(tmp_path / "whole.pt", model, tmp_path / "whole")
    export_checkpoint(tmp_path / "whole", "open_clip", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "open_clip_model.safetensors")
    for name, value in peer.visual.state_dict().items():
        assert torch.equal(exported[f"visual.{name}"], value), name


@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_transformers_tower_is_ours_with_the_gelu_by_tanh(tmp_path: Path, alone: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    if alone:
        peer = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
    else:
        text = {**sizes, "vocab_size": 40, "projection_size": 32}
        peer = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text))
    stir(peer, 3)
    peer.save_pretrained(tmp_path / "peer")
    model = siglip("gelu_tanh")
    import_checkpoint(tmp_path / "peer", model, tmp_path / "vision")
    seen = (peer if alone else peer.vision_model)(images(model)).pooler_output
    close(features(tmp_path / "vision", model, ["vision"]).images, seen)
    close(taken(model, tmp_path / "peer"), seen)
    assert float((taken(siglip(), tmp_path / "peer") - seen).abs().max()) > 1e-5, "the exact GELU is another"


@torch.no_grad()
def test_timm_has_the_tower_with_its_pool_and_without(tmp_path: Path) -> None:
    model = siglip("gelu_tanh")
    tower = timm_tower(model)
    states = {"clip": tower.state_dict(), "mim": {**tower.state_dict(), **masked_stage()}}
    states["mim"] = {name: value for name, value in states["mim"].items() if not name.startswith("attn_pool.")}
    for kind, state in states.items():
        torch.save(state, tmp_path / f"{kind}.pt")
        import_checkpoint(tmp_path / f"{kind}.pt", model, tmp_path / kind)
        assert "no class token" in inspect(tmp_path / kind)["vision tower"]
        export_checkpoint(tmp_path / kind, "timm", tmp_path / "timm" / kind)
        peer = timm.create_model(f"local-dir:{tmp_path / 'timm' / kind}", pretrained=True).eval()
        tokens = tower.forward_features(images(model))
        close(peer(images(model)), tower(images(model)) if kind == "clip" else tokens.mean(1))
        summary = w2s_run(tmp_path / kind, image_size=0, precision="fp32")(images(model)).summary
        close(summary, peer(images(model)))
        assert peer.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]


@torch.no_grad()
def test_it_grows_in_width_and_takes_images_of_another_size(tmp_path: Path) -> None:
    model = siglip()
    tower = timm_tower(model)
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    wide = replace(model.vision, width=64, heads=4, mlp_width=128)
    grown = taken(replace(model, vision=wide, embed_dim=64), tmp_path / "tower.pt", Growth("none", "split", seed=0))
    close(grown, tower(images(model)).repeat(1, 2))
    larger = replace(model, vision=replace(model.vision, image_size=48))
    found = import_checkpoint(tmp_path / "tower.pt", larger, tmp_path / "larger")
    assert found.resized == ["vision.pos_embed"]
    tower.set_input_size(img_size=48)
    close(features(tmp_path / "larger", larger, ["vision"]).images, tower(images(larger)))


@pytest.mark.parametrize("name", ["vit_b_16_siglip", "vit_so400m_14_siglip"])
def test_open_clips_shapes_are_known(name: str) -> None:
    architecture = {"vit_b_16_siglip": "ViT-B-16-SigLIP", "vit_so400m_14_siglip": "ViT-SO400M-14-SigLIP"}[name]
    settings = open_clip.get_model_config(architecture)
    with torch.device("meta"):
        peer = open_clip.CustomTextCLIP(settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"])
    assert known_models(rename(InMemory(peer.state_dict()), Path("x"))) == [name]


def test_what_does_not_go_together_is_one_line(tmp_path: Path) -> None:
    torch.save(released(siglip()), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", siglip(), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"pools by attention, as SigLIP, and transformers has no class.*: use"):
        export_checkpoint(tmp_path / "checkpoint", "transformers", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"of model.vision.kind=siglip, which EVA-CLIP's code does not have"):
        export_checkpoint(tmp_path / "checkpoint", "eva", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"\(it is a SigLIP: model=vit_b_16_siglip is one"):
        import_checkpoint(tmp_path / "clip.pt", model_of("g"), tmp_path / "no")
    kind = ["model=tiny", "model.vision.kind=siglip"]
    ours = [*kind, "model.vision.norm=layernorm", "model.vision.norm_placement=pre", "model.vision.qkv_bias=true"]
    with pytest.raises(ConfigError, match=r"model\.vision\.kind=siglip has norm=layernorm, .*: set all three"):
        load("clip", kind)
    with pytest.raises(ConfigError, match=r"embed_dim=16 is not model\.vision\.width=32: .* set both to one number"):
        load("clip", ours)
    with pytest.raises(ConfigError, match=r"activation=quick_gelu is not of model\.vision\.kind=siglip: use gelu or"):
        load("clip", [*ours, "model.embed_dim=32", "model.vision.activation=quick_gelu"])
