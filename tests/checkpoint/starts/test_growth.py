"""Towers that grow out of smaller ones: the same function by width, layers by depth, alike in every layout."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoint.peers import captions, images, model_of, released
from tests.distributed import run_ranks
from w2s.checkpoint.starts.growth import layer_sources, unit_sources
from w2s.checkpoint.starts.handover import Handover, take_over
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.load import load
from w2s.config.sections import Config, InitConfig, ModelConfig, ParallelConfig
from w2s.errors import CheckpointError
from w2s.megatron.model.initialize import global_name
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.build import build_clip
from w2s.towers.clip import ImageTower, TextTower

TOLERANCE = 1e-5
"""Beside the largest feature: float32 sums of twice as many products, two layers deep."""
LAYER = "blocks.{}.mlp.linear_fc2.weight"


def bigger(model: ModelConfig, times: int = 1, layers: int = 2) -> ModelConfig:
    """Towers of `times` the width and some layers; heads stay as wide."""
    towers = {
        name: replace(
            tower,
            layers=layers,
            width=times * tower.width,
            heads=times * tower.heads,
            mlp_width=times * tower.mlp_width,
        )
        for name, tower in (("vision", model.vision), ("text", model.text))
    }
    return replace(model, **towers)  # type: ignore[arg-type]


def config_of(model: ModelConfig, path: Path, **init: str) -> Config:
    start = InitConfig(vision=str(path), text=str(path), **init)  # type: ignore[arg-type]
    return replace(load("clip", ["model=tiny"]), model=model, init=start)


def grow(model: ModelConfig, path: Path, **init: str) -> tuple[ImageTower, TextTower, Handover]:
    config = config_of(model, path, **init)
    vision, text = build_clip(config, torch.float32, torch.device("cpu"))
    handover = take_over({"vision": vision, "text": text}, config)
    assert handover is not None
    return vision.chunks[0], text.chunks[0], handover


@pytest.fixture
def small(request: pytest.FixtureRequest, alone: Ranks, tmp_path: Path) -> tuple[ModelConfig, Path]:
    """A CLIP of some kind in the released names."""
    model = model_of(getattr(request, "param", "e"))
    save_file(released(model), tmp_path / "clip.safetensors")
    return model, tmp_path / "clip.safetensors"


def weights(tower: ImageTower | TextTower) -> dict[str, Tensor]:
    return {global_name(tower, name): value.detach() for name, value in tower.named_parameters()}


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


def test_where_layers_and_units_come_from() -> None:
    assert layer_sources(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    assert layer_sources(3, 8, "stack") == [0, 1, 2, 0, 1, 2, 1, 2]
    assert layer_sources(3, 6, "interleave") == [0, 0, 1, 1, 2, 2]
    assert layer_sources(6, 8, "interleave") == [0, 0, 1, 2, 3, 3, 4, 5]
    assert layer_sources(3, 3, "stack") == layer_sources(3, 5, "none") == [0, 1, 2]
    assert unit_sources(3, 6) == [0, 1, 2, 0, 1, 2]
    assert unit_sources(6, 8) == [0, 1, 2, 3, 4, 5, 0, 3]


@pytest.mark.parametrize("width", ["copy", "split"])
@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("small", ["18b", "8b", "e", "g"], indirect=True)
def test_a_multiple_of_the_width_is_the_same_function(small: tuple[ModelConfig, Path], times: int, width: str) -> None:
    """Pre- and post-norm, RMS and layer norm, with and without the bias of Q and V; and the causal text tower."""
    model, path = small
    narrow = grow(model, path)
    wide = grow(bigger(model, times), path, grow_width=width)
    assert wide[2].new == []
    with torch.no_grad():
        assert_close(wide[0](images(model)), narrow[0](images(model)))
        assert_close(wide[1](captions(model)), narrow[1](captions(model)))
        patches = narrow[0].patch_tokens(images(model))
        assert_close(wide[0].patch_tokens(images(model)), patches.repeat(1, 1, times))


@pytest.mark.parametrize(("width", "parts"), [("copy", False), ("split", True)])
def test_copies_part_when_they_are_split(small: tuple[ModelConfig, Path], width: str, parts: bool) -> None:
    """By the gradients of the two copies of each hidden unit."""
    model, path = small
    tower, _, _ = grow(bigger(model, 2), path, grow_width=width)
    features = tower(images(model))
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    first, second = dict(tower.named_parameters())["blocks.layers.0.mlp.linear_fc1.bias"].grad.chunk(2)  # type: ignore[union-attr]
    difference = float((first - second).abs().max() / first.abs().max())
    assert difference > 0.1 if parts else difference < TOLERANCE


def test_any_ratio_fills_the_tower(small: tuple[ModelConfig, Path]) -> None:
    model, path = small
    vision = replace(model.vision, width=48, heads=3, mlp_width=80, layers=3)
    tower, _, handover = grow(replace(model, vision=vision), path, grow="interleave", grow_width="split")
    assert handover.new == []
    assert torch.isfinite(tower(images(model))).all()
    # Every second channel is there twice: what reads it shares its weights.
    head, own = weights(tower)["head.weight"], grow(model, path)[0]
    read = head[:, :32].clone()
    read[:, ::2] += head[:, 32:]
    assert_close(read, weights(own)["head.weight"])


@pytest.mark.parametrize("small", ["18b", "8b"], indirect=True)
def test_layers_are_stacked_as_they_are_and_interleaved_by_halves(small: tuple[ModelConfig, Path]) -> None:
    model, path = small
    source, text_source, _ = grow(model, path)
    stacked, stacked_text, handover = grow(bigger(model, layers=4), path, grow="stack")
    for name, tower, origin in (("vision", stacked, source), ("text", stacked_text, text_source)):
        ours, theirs = weights(tower), weights(origin)
        for key, value in ours.items():
            below = re.sub(r"blocks\.(\d)", lambda layer: f"blocks.{int(layer[1]) % 2}", key)
            assert torch.equal(value, theirs[below]), (name, key)
    assert all("blocks" in name for name in handover.grown)
    assert not any("blocks" in name for name in handover.loaded)
    halved, halved_text, _ = grow(bigger(model, layers=4), path, grow="interleave")
    branch = {"post": "blocks.{}.mlp_bda.norm.weight", "pre": LAYER}[model.vision.norm_placement]
    for tower, origin, key in ((halved, source, branch), (halved_text, text_source, LAYER)):
        for layer in range(4):
            whole = weights(origin)[key.format(layer // 2)]
            assert torch.equal(2 * weights(tower)[key.format(layer)], whole)
        one = "blocks.{}.mlp.linear_fc1.weight"
        assert torch.equal(weights(tower)[one.format(3)], weights(origin)[one.format(1)])


def test_a_checkpoint_of_ours_grows_like_the_file(
    small: tuple[ModelConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = small
    monkeypatch.setattr(process_groups, "init_distributed", lambda *_: nullcontext())  # they are there already
    import_checkpoint(path, model, tmp_path / "imported")
    grown = [
        grow(bigger(model, 2, layers=3), each, grow="stack", grow_width="split")
        for each in (path, tmp_path / "imported")
    ]
    for theirs, ours in zip(grown[0][:2], grown[1][:2], strict=True):
        assert all(torch.equal(value, weights(ours)[name]) for name, value in weights(theirs).items())


def test_the_table_says_what_has_grown(small: tuple[ModelConfig, Path]) -> None:
    model, path = small
    deeper = replace(model, vision=replace(model.vision, layers=3))
    _, _, handover = grow(deeper, path, grow="interleave", grow_width="copy")
    rows = {row[0]: row for row in handover.rows()}
    per_layer = len([name for name in handover.loaded if name.startswith("vision.blocks.layers.2.")])
    assert rows["grown"] == ["grown", f"{2 * per_layer}", f"{2 * per_layer} tensors in the layers"]
    assert not any(name.startswith("text.") for name in handover.grown), "the text tower is as large as it was"
    assert handover.parent == str(path)


def test_what_cannot_grow_is_refused(small: tuple[ModelConfig, Path]) -> None:
    model, path = small
    with pytest.raises(CheckpointError, match=r"has no vision\.blocks\.layers\.2"):
        grow(bigger(model, layers=3), path, grow_width="copy")
    with pytest.raises(CheckpointError, match=r"is \[64\] there and \[128\] here"):
        grow(bigger(model, 2), path, grow="stack")
    with pytest.raises(CheckpointError, match=r"this model has no .*blocks\.1"):
        grow(bigger(model, layers=1), path, grow="stack")
    vision = replace(model.vision, width=56, heads=4)
    with pytest.raises(CheckpointError, match=r"a visual tower of width 32, this model has heads of width 14: "):
        grow(replace(model, vision=vision), path, grow_width="copy")


def split(model: ModelConfig, path: Path) -> list[dict[str, Tensor]]:
    """This rank's vision tower under TP2 and under PP2, by global name."""
    results = []
    for parallel in (ParallelConfig(tensor=2), ParallelConfig(pipeline=2)):
        with process_groups.initialize_groups(parallel, torch.device("cpu")):
            config = replace(config_of(model, path, grow="stack", grow_width="split"), parallel=parallel)
            vision, text = build_clip(config, torch.float32, torch.device("cpu"))
            take_over({"vision": vision, "text": text}, config)
            results.append(weights(vision.chunks[0]))
    return results


def test_every_layout_grows_alike(small: tuple[ModelConfig, Path]) -> None:
    model, path = small
    target = bigger(model, 2, layers=3)
    whole = weights(grow(target, path, grow="stack", grow_width="split")[0])
    (tensor, stage), (other_tensor, other_stage) = run_ranks(split, 2, target, path)
    for name, value in tensor.items():
        axis = next((a for a, size in enumerate(value.shape) if size != whole[name].shape[a]), None)
        joined = value if axis is None else torch.cat([value, other_tensor[name]], axis)
        assert torch.equal(joined, whole[name]), name
    assert {**stage, **other_stage}.keys() == whole.keys()
    for name, value in (*stage.items(), *other_stage.items()):
        assert torch.equal(value, whole[name]), name
