"""Vision towers of OpenAI's kind and of SigLIP's: from peers' weights into ours, growing, and back."""

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
from tests.checkpoint.peers import (
    captions,
    images,
    masked_stage,
    model_of,
    open_clip_config,
    released,
    stir,
    timm_tower,
)
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.starts.growth import NO_GROWTH, Growth
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


def of_kind(kind: str, activation: Any) -> ModelConfig:
    """A small CLIP of `vit` or `siglip`; that of `vit` has one activation in both towers."""
    model = model_of(kind)
    text = replace(model.text, activation=activation) if kind == "vit" else model.text
    return replace(model, vision=replace(model.vision, activation=activation), text=text)


def vit_of(model: ModelConfig) -> open_clip.CLIP:
    clip = open_clip.CLIP(**open_clip_config(model), quick_gelu=model.vision.activation == "quick_gelu")
    stir(clip, 5)
    return clip


@pytest.fixture
def siglip(monkeypatch: pytest.MonkeyPatch) -> open_clip.CustomTextCLIP:
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


def taken(model: ModelConfig, file: Path, growth: Growth = NO_GROWTH) -> list[Tensor]:
    """What our towers give that take a file over without a conversion; a SigLIP's text tower is not one of ours."""
    config = replace(load("clip", ["model=tiny", "hardware=cpu"]), model=model)
    with process_groups.init_distributed(config.parallel, config.hardware), torch.no_grad():
        towers = dict(zip(("vision", "text"), build_clip(config, torch.float32, torch.device("cpu")), strict=True))
        given = {"vision": images(model), "text": captions(model)}
        if model.vision.kind == "siglip" or growth:
            del towers["text"]
        for name, tower in towers.items():
            assert hand_over(tower, name, file, growth=growth).new == []
        return [tower.chunks[0](given[name]) for name, tower in towers.items()]


@pytest.mark.parametrize("activation", [pytest.param("gelu", marks=pytest.mark.slow), "quick_gelu"])
def test_open_clips_own_vit_comes_in_and_goes_out_again(tmp_path: Path, activation: str) -> None:
    model = of_kind("vit", activation)
    peer = vit_of(model)
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
        ours = taken(model, tmp_path / "clip.pt")
        teacher = w2s_run(tmp_path / "checkpoint", image_size=0, precision="fp32")(images(model))
    close(ours[0], seen)
    close(ours[1], read)
    close(teacher.summary, seen)


def test_timm_has_the_vit_too(tmp_path: Path) -> None:
    model = of_kind("vit", "quick_gelu")
    peer = vit_of(model)
    torch.save(peer.state_dict(), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", "timm", tmp_path / "timm")
    tower = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        close(tower(images(model)), peer.encode_image(images(model)))


def test_a_masked_stage_grows_out_of_the_vit(tmp_path: Path) -> None:
    """Twice as wide it is the same function."""
    model = of_kind("vit", "gelu")
    peer = vit_of(model)
    torch.save(peer.state_dict(), tmp_path / "clip.pt")
    wide = replace(model, vision=replace(model.vision, width=64, heads=4, mlp_width=256))
    (seen,) = taken(wide, tmp_path / "clip.pt", Growth("none", "copy", seed=0))
    with torch.no_grad():
        close(seen, peer.encode_image(images(model)))


@torch.no_grad()
def test_open_clips_siglip_comes_in_and_goes_out_again(tmp_path: Path, siglip: open_clip.CustomTextCLIP) -> None:
    """Its text tower stays out: with one of ours beside it the export is a CLIP."""
    model = of_kind("siglip", "gelu")
    seen = siglip.encode_image(images(model))
    torch.save({"state_dict": siglip.state_dict()}, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "vision")
    assert (found.missing, found.resized) == ([], [])
    assert all(name.startswith(("text.", "logit_scale", "logit_bias")) for name in found.unexpected)
    assert inspect(tmp_path / "clip.pt")["text tower"] == "of another kind than w2s's"
    close(features(tmp_path / "vision", model, ["vision"]).images, seen)
    close(taken(model, tmp_path / "clip.pt")[0], seen)
    features_of_run = w2s_run(tmp_path / "vision", image_size=0, precision="fp32")(images(model))
    close(features_of_run.summary, seen)
    close(features_of_run.patches, siglip.visual.trunk.forward_features(images(model)))
    whole = {**siglip.state_dict(), **{n: v for n, v in released(model).items() if n.startswith("text.")}}
    whole = {name: value for name, value in whole.items() if not name.startswith(("text.text_projection.",))}
    torch.save(whole, tmp_path / "whole.pt")
    import_checkpoint(tmp_path / "whole.pt", model, tmp_path / "whole")
    export_checkpoint(tmp_path / "whole", "open_clip", tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "open_clip_model.safetensors")
    for name, value in siglip.visual.state_dict().items():
        assert torch.equal(exported[f"visual.{name}"], value), name


@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_transformers_siglip_is_ours_with_the_gelu_by_tanh(tmp_path: Path, alone: bool) -> None:
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
    model = of_kind("siglip", "gelu_tanh")
    import_checkpoint(tmp_path / "peer", model, tmp_path / "vision")
    seen = (peer if alone else peer.vision_model)(images(model)).pooler_output
    close(features(tmp_path / "vision", model, ["vision"]).images, seen)
    close(taken(model, tmp_path / "peer")[0], seen)
    assert float((taken(of_kind("siglip", "gelu"), tmp_path / "peer")[0] - seen).abs().max()) > 1e-5, (
        "the exact GELU is another"
    )


@torch.no_grad()
def test_timm_has_siglips_tower_with_its_pool_and_without(tmp_path: Path) -> None:
    model = of_kind("siglip", "gelu_tanh")
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
def test_siglip_grows_in_width_and_takes_images_of_another_size(tmp_path: Path) -> None:
    model = of_kind("siglip", "gelu")
    tower = timm_tower(model)
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    wide = replace(model.vision, width=64, heads=4, mlp_width=128)
    (grown,) = taken(replace(model, vision=wide, embed_dim=64), tmp_path / "tower.pt", Growth("none", "split", seed=0))
    close(grown, tower(images(model)).repeat(1, 2))
    larger = replace(model, vision=replace(model.vision, image_size=48))
    found = import_checkpoint(tmp_path / "tower.pt", larger, tmp_path / "larger")
    assert found.resized == ["vision.pos_embed"]
    tower.set_input_size(img_size=48)
    close(features(tmp_path / "larger", larger, ["vision"]).images, tower(images(larger)))


@pytest.mark.parametrize("name", ["vit_b_16_siglip", "vit_so400m_14_siglip"])
def test_open_clips_siglips_are_known_by_their_shapes(name: str) -> None:
    architecture = {"vit_b_16_siglip": "ViT-B-16-SigLIP", "vit_so400m_14_siglip": "ViT-SO400M-14-SigLIP"}[name]
    settings = open_clip.get_model_config(architecture)
    with torch.device("meta"):
        peer = open_clip.CustomTextCLIP(settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"])
    assert known_models(rename(InMemory(peer.state_dict()), Path("x"))) == [name]


def test_what_the_vit_does_not_go_with_is_one_line(tmp_path: Path) -> None:
    plain, quick = of_kind("vit", "gelu"), of_kind("vit", "quick_gelu")
    mixed = replace(plain, vision=quick.vision)
    torch.save(released(mixed), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", mixed, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"quick_gelu in its vision tower and gelu.*use --format transformers"):
        export_checkpoint(tmp_path / "checkpoint", "open_clip", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"of model\.vision\.kind=clip, which EVA-CLIP's code does not have"):
        export_checkpoint(tmp_path / "checkpoint", "eva", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"does not hold the model small-vit: .*linear_fc1"):
        torch.save(released(model_of("g")), tmp_path / "g.pt")
        import_checkpoint(tmp_path / "g.pt", plain, tmp_path / "no")
    with pytest.raises(ConfigError, match=r"model\.vision\.kind=clip has norm=layernorm, .*: set all three"):
        load("clip", ["model=tiny", "model.vision.kind=clip"])
    with pytest.raises(
        ConfigError, match=r"activation=quick_gelu is not of model\.vision\.kind=eva: use gelu, or another kind"
    ):
        load("clip", ["model=tiny", "model.vision.activation=quick_gelu"])


def test_what_siglip_does_not_go_with_is_one_line(tmp_path: Path) -> None:
    model = of_kind("siglip", "gelu")
    torch.save(released(model), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "checkpoint")
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
