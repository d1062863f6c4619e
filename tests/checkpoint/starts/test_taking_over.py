"""Towers straight from other people's weights, of another size, and split over ranks."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from tests.checkpoint.peers import model_of, open_clip_model, released
from tests.distributed import run_ranks
from w2s.checkpoint.starts.handover import Handover, hand_over, take_over
from w2s.checkpoint.weights.eva_format import split_heads
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.matching import Fit
from w2s.config.load import load
from w2s.config.sections import Config, InitConfig, ModelConfig, ParallelConfig
from w2s.errors import CheckpointError
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.optimizer import Towers
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.build import build_clip

whole_read = Fit.read


def config_of(model: ModelConfig, parallel: ParallelConfig, **init: Any) -> Config:
    config = load("clip", ["model=tiny"])
    return replace(config, model=model, parallel=parallel, init=InitConfig(**init))


def towers_of(config: Config) -> Towers:
    vision, text = build_clip(config, torch.float32, torch.device("cpu"))
    return {"vision": vision, "text": text}


def values(towers: Towers, name: str) -> dict[str, Tensor]:
    return {key: value.detach().clone() for part in towers[name].chunks for key, value in part.named_parameters()}


def taken(model: ModelConfig, **init: Any) -> tuple[Handover, dict[str, Tensor], dict[str, Tensor]]:
    config = config_of(model, ParallelConfig(), **init)
    towers = towers_of(config)
    handover = take_over(towers, config)
    assert handover is not None
    return handover, values(towers, "vision"), values(towers, "text")


@pytest.fixture(params=["file", "checkpoint"])
def source(request: pytest.FixtureRequest, tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CLIP of E's kind, as released and as imported."""
    save_file(released(model_of("e")), tmp_path / "clip.safetensors")
    if request.param == "file":
        return tmp_path / "clip.safetensors"
    monkeypatch.setattr(process_groups, "init_distributed", lambda *_: nullcontext())  # they are there already
    import_checkpoint(tmp_path / "clip.safetensors", model_of("e"), tmp_path / "imported")
    return tmp_path / "imported"


def test_both_towers_with_their_projections(source: Path) -> None:
    clip = released(model_of("e"))
    handover, vision, text = taken(model_of("e"), vision=str(source), text=str(source))
    assert (handover.new, handover.dropped, handover.resized) == ([], [], [])
    assert len(handover.loaded) == len(clip)
    fused = split_heads(clip["visual.blocks.1.attn.qkv.weight"], 2).flatten(0, 2)
    assert torch.equal(vision["blocks.layers.1.self_attention.linear_qkv.weight"], fused)
    assert torch.equal(vision["head.weight"], clip["visual.head.weight"])
    assert text["logit_scale"] == 2.5
    assert torch.equal(text["text_projection"], clip["text.text_projection"])


def test_the_towers_may_come_from_two_checkpoints(source: Path, tmp_path: Path) -> None:
    assert taken(model_of("e"), vision=str(source), text=str(source))[0].title == f"taken from {source}"
    save_file(released(model_of("18b")), tmp_path / "other.safetensors")
    handover, _, _ = taken(model_of("e"), vision=str(source), text=str(tmp_path / "other.safetensors"))
    assert handover.title == f"taken from {source} and {tmp_path / 'other.safetensors'}"
    assert handover.sources[0] == source


def test_projections_start_afresh_when_asked_or_when_widths_differ(source: Path) -> None:
    projections = ["vision.head.bias", "vision.head.weight", "text.logit_scale", "text.text_projection"]
    theirs = ["visual.head.bias", "visual.head.weight", "logit_scale", "text.text_projection"]
    fresh = towers_of(config_of(model_of("e"), ParallelConfig()))
    handover, vision, text = taken(model_of("e"), vision=str(source), text=str(source), projections="fresh")
    assert handover.new == projections
    assert len(handover.dropped) == len(theirs)
    assert torch.equal(vision["head.weight"], values(fresh, "vision")["head.weight"])
    assert torch.equal(text["logit_scale"], values(fresh, "text")["logit_scale"])
    wider = replace(model_of("e"), embed_dim=20)
    assert taken(wider, vision=str(source), text=str(source))[0].new == projections


def test_another_image_size(source: Path) -> None:
    clip = released(model_of("e"))
    handover, vision, _ = taken(model_of("e", image_size=48), vision=str(source))
    assert handover.resized == ["vision.pos_embed"]
    assert handover.rows()[1] == ["resized", "1", "vision.pos_embed"]
    expected = resample_abs_pos_embed(clip["visual.pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.equal(vision["pos_embed"], expected)
    assert torch.equal(vision["cls_token"], clip["visual.cls_token"])


def test_the_text_tower_of_open_clips_vit(alone: Ranks, tmp_path: Path) -> None:
    model = model_of("18b")
    clip = open_clip_model(model)
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "vit.pt")
    handover, _, text = taken(model, text=str(tmp_path / "vit.pt"))
    assert handover.new == []
    assert torch.equal(text["token_embedding"], clip.token_embedding.weight)
    expected = split_heads(clip.transformer.resblocks[0].attn.in_proj_bias, 2).flatten()
    assert torch.equal(text["blocks.layers.0.self_attention.linear_qkv.bias"], expected)
    with pytest.raises(CheckpointError, match=r"vit\.pt is of another model: .*kind: model=vit_b_16 is one"):
        taken(model, vision=str(tmp_path / "vit.pt"))


def test_what_does_not_fit_names_the_first_tensor(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is of another model.*: it has no vision\.blocks\.layers\.2"):
        taken(replace(model_of("e"), vision=replace(model_of("e").vision, layers=3)), vision=str(source))
    with pytest.raises(CheckpointError, match=r"this model has no .*v.*blocks\.(layers\.)?1"):
        taken(replace(model_of("e"), vision=replace(model_of("e").vision, layers=1)), vision=str(source))
    with pytest.raises(CheckpointError, match=r"linear_fc1\.bias is \[64\] there and \[96\] here"):
        taken(replace(model_of("e"), vision=replace(model_of("e").vision, mlp_width=96)), vision=str(source))


def test_what_it_is_instead_is_said_as_by_import(alone: Ranks, tmp_path: Path) -> None:
    names = {"visual.blocks.0.attn.q_proj.weight": "with rotary positions", "visual.attn_pool.query": "by attention"}
    for name, hint in names.items():
        save_file({**released(model_of("e")), name: torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=f"this model has no {name} .*{hint}.*: use it as a teacher"):
            taken(model_of("e"), vision=str(tmp_path / "other.safetensors"))


def split(path: Path) -> list[tuple[dict[str, Tensor], set[str]]]:
    """This rank's vision tower under TP2 and under PP2, by global name, and the tensors that it has read."""
    results = []
    for parallel in (ParallelConfig(tensor=2), ParallelConfig(pipeline=2)):
        with process_groups.initialize_groups(parallel, torch.device("cpu")), pytest.MonkeyPatch.context() as patch:
            towers, read = towers_of(config_of(model_of("e"), parallel)), set[str]()
            patch.setattr(Fit, "read", lambda found, name, seen=read: seen.add(name) or whole_read(found, name))
            hand_over(towers["vision"], "vision", path)
            (part,) = towers["vision"].chunks
            own = {global_name(part, name): value.detach() for name, value in part.named_parameters()}
        results.append((own, read))
    return results


def test_every_rank_takes_its_own_part(alone: Ranks, tmp_path: Path) -> None:
    save_file(released(model_of("e")), tmp_path / "clip.safetensors")
    whole = taken(model_of("e"), vision=str(tmp_path / "clip.safetensors"))[1]
    whole = {name.replace("blocks.layers.", "blocks."): value for name, value in whole.items()}
    (tensor, stage), (other_tensor, other_stage) = run_ranks(split, 2, tmp_path / "clip.safetensors")
    for name, value in tensor[0].items():
        axis = next((a for a, size in enumerate(value.shape) if size != whole[name].shape[a]), None)
        joined = value if axis is None else torch.cat([value, other_tensor[0][name]], axis)
        assert torch.equal(joined, whole[name]), name
    assert not stage[1] & other_stage[1], "no tensor is read by both stages"
    assert stage[0].keys() | other_stage[0].keys() == whole.keys()
    for name, value in (*stage[0].items(), *other_stage[0].items()):
        assert torch.equal(value, whole[name]), name
