"""The exports of the full sizes, on the meta device: what open_clip and timm build from our configurations."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch

from w2s.checkpoint.export.formats.open_clip import open_clip_config, open_clip_name
from w2s.checkpoint.export.formats.timm import named_tower, timm_config, timm_name
from w2s.checkpoint.export.formats.transformers import clip_config, dual_encoder_config, sources
from w2s.checkpoint.weights.eva_format import released_name
from w2s.checkpoint.weights.released import rename
from w2s.checkpoint.weights.tensor_files import InMemory
from w2s.checkpoint.weights.views import View
from w2s.config.load import load
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.shapes import model_shapes


@pytest.mark.parametrize("name", ["eva_18b", "eva_8b", "eva02_e_plus", "eva01_g"])
def test_full_sizes_have_open_clips_and_timms_names_and_shapes(alone: Ranks, tmp_path: Path, name: str) -> None:
    model = load("clip", [f"model={name}"]).model
    shapes = {released_name(key): shape for key, shape in model_shapes(model).items()}
    (tmp_path / "config.json").write_text(json.dumps(timm_config(model.vision, model.embed_dim)))
    named = named_tower(model.vision) or f"local-dir:{tmp_path}"
    config = open_clip_config(model, named, logit_bias=False)["model_cfg"]
    config.pop("custom_text")
    with torch.device("meta"):
        tower = timm.create_model(f"local-dir:{tmp_path}")
        clip = open_clip.CustomTextCLIP(**config)
    theirs = {key: tuple(value.shape) for key, value in clip.state_dict().items() if key != "text.attn_mask"}
    assert theirs == {open_clip_name(key): shape for key, shape in shapes.items()}
    if not model.vision.qkv_bias:
        shapes["visual.head.bias"] = (model.embed_dim,)  # of zeros
    vision = {timm_name(key): shape for key, shape in shapes.items() if key.startswith("visual.")}
    assert {key: tuple(value.shape) for key, value in tower.state_dict().items()} == vision


@pytest.mark.parametrize("name", ["eva_18b", "eva02_e_plus", "vit_bigg_14"])
def test_full_sizes_have_the_names_and_shapes_of_transformers_classes(alone: Ranks, name: str) -> None:
    """Names and shapes on the meta device, of EVA-18B too."""
    transformers = pytest.importorskip("transformers", "5", reason="an optional package: pip install 'w2s[hf]'")
    model = load("clip", [f"model={name}"]).model
    shapes = model_shapes(model)
    tensors = {released_name(key): torch.empty(shape, device="meta") for key, shape in shapes.items()}
    plain = model.vision.kind == "clip"
    config = (clip_config if plain else dual_encoder_config)(model)
    with torch.device("meta"):
        peer = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    source = rename(InMemory(tensors), Path("x"))
    made = View(source, sources(source, plain)).meta
    found = {name.replace("text_model.text_model.", "text_model."): tuple(made[name].shape) for name in made}
    assert found == {name: tuple(value.shape) for name, value in peer.state_dict().items()}
