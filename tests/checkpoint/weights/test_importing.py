"""Other people's weights into ours: every format, resizing, and what does not fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from tests.checkpoint.ours import assert_holds, features
from tests.checkpoint.peers import (
    EMBED,
    captions,
    images,
    model_of,
    open_clip_model,
    released,
    text_tower,
    timm_tower,
)
from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.weights.importing import import_checkpoint, with_size
from w2s.checkpoint.weights.released import open_released, rename
from w2s.checkpoint.weights.tensor_files import open_weights
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError, UserError

TOLERANCE = 1e-5
"""Relative to the largest value: float32 sums over 128 products, a few layers deep."""


def wrap(tensors: dict[str, Tensor], kind: str) -> Any:
    """As training programs save them."""
    match kind:
        case "state_dict":
            return {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in tensors.items()}}
        case "model":
            return {"model": tensors}
        case _:
            return tensors


def open_clip_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As open_clip names a CLIP with a tower of timm's and a text tower of its own."""
    return {name.replace("visual.", "visual.trunk.").removeprefix("text."): value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", ["18b", "8b", "e", "g"])
def test_an_imported_clip_gives_the_peers_features(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    torch.save(released(model), tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "out")
    assert (found.missing, found.unexpected, found.resized) == ([], [], [])
    assert len(found.loaded) == len(released(model))
    imported = features(tmp_path / "out", model)
    with torch.no_grad():
        pairs = [
            (imported.images, timm_tower(model)(images(model))),
            (imported.texts, text_tower(model)(captions(model))),
        ]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    assert imported.logit_scale == 2.5


@pytest.mark.parametrize(
    ("ending", "wrapping"),
    [
        (".pt", "plain"),
        (".pt", "state_dict"),
        (".bin", "model"),
        (".safetensors", "plain"),
        (".safetensors.index.json", "plain"),
        (".bin.index.json", "state_dict"),
    ],
)
def test_every_kind_of_file(tmp_path: Path, ending: str, wrapping: str) -> None:
    model = model_of("e")
    tensors = {name: value.half() for name, value in released(model).items()}
    path = tmp_path / f"model{ending}"
    if "index" in ending:
        names, kind = list(tensors), ending.split(".")[1]
        parts = {f"model-{part}.{kind}": names[part::2] for part in range(2)}
        for part, members in parts.items():
            content = {name: tensors[name].contiguous() for name in members}
            torch.save(wrap(content, wrapping), tmp_path / part) if kind == "bin" else save_file(
                content, tmp_path / part
            )
        path.write_text(json.dumps({"weight_map": {name: part for part in parts for name in parts[part]}}))
    elif ending == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(wrap(tensors, wrapping), path)
    import_checkpoint(path, model, tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)
    if "index" in ending:  # the folder that holds it will do
        import_checkpoint(tmp_path, model, tmp_path / "again")
        assert_holds(tmp_path / "again", tensors)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_archive_as_openai_publishes_its_clips(tmp_path: Path) -> None:
    tower = text_tower(model_of("g"))
    torch.jit.save(torch.jit.trace(tower, captions(model_of("g"))), tmp_path / "clip.pt")
    found = rename(open_weights(tmp_path / "clip.pt"), tmp_path / "clip.pt")
    expected = {f"text.{name}": value for name, value in tower.state_dict().items()}
    assert found.meta.keys() == expected.keys()
    assert all(torch.equal(found.read(name), value) for name, value in expected.items())


def test_names_of_open_clip_timm_and_the_masked_stage(tmp_path: Path) -> None:
    model = model_of("e")
    clip = released(model)
    torch.save(open_clip_names(clip), tmp_path / "open_clip.pt")
    import_checkpoint(tmp_path / "open_clip.pt", model, tmp_path / "from_open_clip")
    assert_holds(tmp_path / "from_open_clip", clip)

    tower = timm_tower(model).state_dict()
    torch.save(tower, tmp_path / "timm.pt")
    import_checkpoint(tmp_path / "timm.pt", model, tmp_path / "from_timm")
    assert_holds(tmp_path / "from_timm", {f"visual.{name}": value for name, value in tower.items()})

    student = {name: value for name, value in tower.items() if not name.startswith("head")}
    student |= {
        "mask_token": torch.randn(1, 1, 32),
        "lm_head.weight": torch.randn(24, 32),
        "lm_head.bias": torch.ones(24),
    }
    torch.save(student, tmp_path / "mim.pt")
    import_checkpoint(tmp_path / "mim.pt", model, tmp_path / "from_mim")
    assert_holds(tmp_path / "from_mim", {f"visual.{name}": value for name, value in student.items()})


def test_the_bias_of_zeros_that_timms_heads_have_is_left_out(tmp_path: Path) -> None:
    model = model_of("18b")
    tower = timm_tower(model).state_dict()
    torch.save({**tower, "head.bias": torch.zeros(EMBED)}, tmp_path / "zeros.pt")
    found = import_checkpoint(tmp_path / "zeros.pt", model, tmp_path / "out")
    assert found.unexpected == []
    torch.save({**tower, "head.bias": torch.ones(EMBED)}, tmp_path / "ones.pt")
    with pytest.raises(CheckpointError, match=r"1 tensors are unexpected, such as head\.bias"):
        import_checkpoint(tmp_path / "ones.pt", model, tmp_path / "no")


def test_the_text_tower_of_open_clips_own_vit(tmp_path: Path) -> None:
    model = model_of("g")
    clip = open_clip_model(model)
    torch.save(clip.state_dict(), tmp_path / "vit.pt")
    with pytest.raises(CheckpointError, match=r"open_clip's kind: model=vit_b_16 is one, model\.vision\.kind=clip"):
        import_checkpoint(tmp_path / "vit.pt", model, tmp_path / "out")
    found = import_checkpoint(tmp_path / "vit.pt", model, tmp_path / "out", allowed=["visual.*", "vision.*"])
    assert all(name.startswith("text.") for name in found.loaded)
    assert torch.equal(open_released(tmp_path / "out").read("text.ln_final.weight"), clip.ln_final.weight)


def test_another_image_size_interpolates_the_positions(tmp_path: Path) -> None:
    model = model_of("e")
    clip = released(model)
    torch.save(clip, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", with_size(model, 48, None), tmp_path / "out")
    assert found.resized == ["vision.pos_embed"]
    assert read_meta(tmp_path / "out").config["model"]["vision"]["image_size"] == 48
    positions = open_released(tmp_path / "out").read("visual.pos_embed")
    assert torch.equal(positions[:, 0], clip["visual.pos_embed"][:, 0])
    assert torch.equal(positions, resample_abs_pos_embed(clip["visual.pos_embed"], [6, 6], num_prefix_tokens=1))


def test_another_patch_size_keeps_the_embedding_of_an_enlarged_image(tmp_path: Path) -> None:
    model = model_of("g")
    clip = released(model)
    torch.save(clip, tmp_path / "clip.pt")
    found = import_checkpoint(tmp_path / "clip.pt", with_size(model, 64, 16), tmp_path / "out")
    assert found.resized == ["vision.patch_embed.weight"]
    kernel, old = (
        open_released(tmp_path / "out").read("visual.patch_embed.proj.weight"),
        clip["visual.patch_embed.proj.weight"],
    )
    patch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    enlarged = torch.nn.functional.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    before, after = (torch.nn.functional.conv2d(x, k) for x, k in ((patch, old), (enlarged, kernel)))
    # the pseudo-inverse of a 256 x 64 matrix in float32
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_ours_can_be_imported_for_another_size(tmp_path: Path) -> None:
    model = model_of("18b")
    torch.save(released(model), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "small")
    import_checkpoint(tmp_path / "small", with_size(model, 48, None), tmp_path / "large")
    import_checkpoint(tmp_path / "clip.pt", with_size(model, 48, None), tmp_path / "direct")
    direct = open_released(tmp_path / "direct")
    assert_holds(tmp_path / "large", {name: direct.read(name) for name in direct.meta})


def test_a_shorter_context_keeps_the_first_positions(tmp_path: Path) -> None:
    model = model_of("g")
    clip = released(model)
    torch.save(clip, tmp_path / "clip.pt")
    shorter = replace(model, text=replace(model.text, context_length=8))
    found = import_checkpoint(tmp_path / "clip.pt", shorter, tmp_path / "out")
    assert found.resized == ["text.positional_embedding"]
    kept = open_released(tmp_path / "out").read("text.positional_embedding")
    assert torch.equal(kept, clip["text.positional_embedding"][:8])
    with pytest.raises(CheckpointError, match=r"text\.positional_embedding is \[12, 32\] there and \[20, 32\] here"):
        import_checkpoint(
            tmp_path / "clip.pt", replace(model, text=replace(model.text, context_length=20)), tmp_path / "no"
        )


def wrong_files(folder: Path, model: ModelConfig) -> dict[str, tuple[Path, str]]:
    """Files that cannot be imported, and what is said of them."""
    clip = released(model)
    names = [
        "garbage.pt", "cut.pt", "garbage.safetensors", "cut.safetensors", "old.pt", "code.pt", "number.pt", "gap.pt",
        "extra.pt", "shape.pt", "notes.txt", "empty.safetensors", "list.index.json", "names.index.json",
        "empty.index.json",
    ]  # fmt: skip
    paths = {name: folder / name for name in names}
    for name in ("garbage.pt", "garbage.safetensors", "notes.txt"):
        paths[name].write_bytes(b"not weights at all, but long enough to have a header")
    torch.save(clip, folder / "whole.pt")
    save_file(clip, folder / "whole.safetensors")
    for name in ("cut.pt", "cut.safetensors"):
        content = (folder / name.replace("cut", "whole")).read_bytes()
        paths[name].write_bytes(content[: len(content) // 2])
    torch.save(clip, paths["old.pt"], _use_new_zipfile_serialization=False)
    torch.save({"state_dict": clip, "config": model}, paths["code.pt"])
    torch.save({"step": 3}, paths["number.pt"])
    torch.save({name: value for name, value in clip.items() if name != "visual.norm.weight"}, paths["gap.pt"])
    torch.save({**clip, "visual.blocks.7.norm1.weight": torch.ones(32)}, paths["extra.pt"])
    torch.save({**clip, "visual.blocks.0.mlp.fc1.weight": torch.ones(65, 32)}, paths["shape.pt"])
    save_file({}, paths["empty.safetensors"])
    for name, content in {"list": [1], "names": {"weight_map": ["a"]}, "empty": {"weight_map": {}}}.items():
        paths[f"{name}.index.json"].write_text(json.dumps(content))
    messages = {
        "garbage.pt": "cannot be read: it is not a file of weights", "cut.pt": "cannot be read",
        "garbage.safetensors": "cannot be read",
        "cut.safetensors": "cannot be read", "old.pt": "PyTorch's old format", "code.pt": "which may run code",
        "number.pt": "holds no tensors", "gap.pt": "1 tensors are missing, such as vision.norm.weight",
        "extra.pt": "1 tensors are unexpected, such as visual.blocks.7.norm1.weight",
        "shape.pt": "is [65, 32] there and [64, 32] here", "notes.txt": "is not a weights file",
        "empty.safetensors": "holds no tensors", "list.index.json": "is not an index of weights",
        "names.index.json": "is not an index of weights", "empty.index.json": "holds no tensors",
    }  # fmt: skip
    return {name: (paths[name], messages[name]) for name in names} | {"none": (folder / "none.pt", "does not exist")}


def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    model = model_of("18b")
    for path, message in wrong_files(tmp_path, model).values():
        with pytest.raises(CheckpointError) as error:
            import_checkpoint(path, model, tmp_path / "out")
        assert message in str(error.value) and "\n" not in str(error.value)
        assert str(path) in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("shape", [(1, 17), (1, 16, 32), (1, 1, 32), (1, 17, 40)])
def test_positions_of_no_square_grid_are_a_misfit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = model_of("18b", image_size=48)
    torch.save({**released(model), "visual.pos_embed": torch.ones(shape)}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"vision\.pos_embed is .* there and \[1, 37, 32\] here"):
        import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "out")


def test_gaps_may_be_allowed_by_name(tmp_path: Path) -> None:
    model = model_of("18b")
    clip = released(model)
    del clip["visual.norm.weight"]
    torch.save({**clip, "visual.blocks.7.norm1.weight": torch.ones(32)}, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match="unexpected"):
        import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "out", allowed=["vision.norm.*"])
    allowed = ["vision.norm.weight", "visual.blocks.7.*"]
    found = import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "out", allowed=allowed)
    assert [row[:2] for row in found.rows()] == [
        ["loaded", str(len(clip))], ["resized", "0"], ["missing", "1"], ["unexpected", "1"]
    ]  # fmt: skip
    assert_holds(tmp_path / "out", clip)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    model = model_of("18b")
    torch.save(released(model), tmp_path / "clip.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="out exists already"):
        import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
