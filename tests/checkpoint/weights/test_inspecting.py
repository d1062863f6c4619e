"""What `w2s inspect` says of a checkpoint."""

from pathlib import Path

import pytest
import timm
import torch

from tests.checkpoint.peers import model_of, open_clip_model, released, timm_tower
from w2s.checkpoint.weights.eva_format import released_name
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.inspecting import inspect, known_models
from w2s.checkpoint.weights.released import rename
from w2s.checkpoint.weights.tensor_files import InMemory
from w2s.config.load import load
from w2s.errors import CheckpointError
from w2s.megatron.parallel.process_groups import Ranks
from w2s.towers.shapes import model_shapes


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    model = model_of("18b")
    torch.save(released(model), tmp_path / "clip.pt")
    import_checkpoint(tmp_path / "clip.pt", model, tmp_path / "out")
    about = inspect(tmp_path / "out")
    numbers = {name: value.numel() for name, value in released(model).items()}
    vision = sum(count for name, count in numbers.items() if name.startswith("visual."))
    expected = {
        "format": "w2s checkpoint",
        "stage": "import",
        "model": "small-18b",
        "step": "0",
        "samples": "0",
        "parent": str(tmp_path / "clip.pt"),
        "parameters": f"{sum(numbers.values()):,}",
        "of the vision tower": f"{vision:,}",
        "vision tower": "2 layers x 32, MLP 64, 32 px in patches of 8, rmsnorm, without a bias on Q and V",
        "text tower": "2 layers x 32, 12 tokens",
    }
    assert {name: about[name] for name in expected} == expected


def test_other_peoples_formats(tmp_path: Path) -> None:
    model = model_of("e")
    files = {
        "EVA-CLIP's released names": released(model),
        "timm": timm_tower(model).state_dict(),
        "EVA's masked stage": {**timm_tower(model).state_dict(), "mask_token": torch.zeros(1, 1, 32)},
        "open_clip": open_clip_model(model).state_dict(),
        "a text tower alone": {"token_embedding.weight": torch.zeros(9, 4), "positional_embedding": torch.zeros(3, 4)},
    }
    for index, (format, tensors) in enumerate(files.items()):
        torch.save({"state_dict": tensors}, tmp_path / f"{index}.pt")
        assert inspect(tmp_path / f"{index}.pt")["format"] == format
    assert "a norm before the layers" in inspect(tmp_path / "3.pt")["vision tower"]
    assert inspect(tmp_path / "3.pt")["model"] == "none of configs/model"
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "none.pt")


def test_towers_of_another_kind_are_not_described_as_ours(tmp_path: Path) -> None:
    plain = timm.create_model("test_vit").state_dict()
    torch.save(plain, tmp_path / "plain.pt")
    torch.save({name: value for name, value in plain.items() if "patch_embed" not in name}, tmp_path / "part.pt")
    torch.save({**released(model_of("e")), "visual.pos_embed": torch.zeros(5)}, tmp_path / "odd.pt")
    for name in ("plain", "part", "odd"):
        about = inspect(tmp_path / f"{name}.pt")
        assert about["vision tower"] == "of another kind than w2s's"
        assert about["model"] == "none of configs/model"


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_models_of_transformers_are_called_that(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {"vision_config": small, "text_config": {**small, "vocab_size": 9}}
    peer = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(kind, **(small if kind == "dinov2" else sizes))
    )
    peer.save_pretrained(tmp_path / "peer")
    about = inspect(tmp_path / "peer")
    assert about["format"] == "transformers"
    text = sum(value.numel() for name, value in peer.named_parameters() if name.startswith("text_"))
    assert about.get("of the text tower") == (f"{text:,}" if text else None)
    hints = {"clip": "ViT of OpenAI", "siglip": "it is a SigLIP", "dinov2": "use its folder as a teacher, hf:FOLDER"}
    with pytest.raises(CheckpointError, match=hints[kind]):
        import_checkpoint(tmp_path / "peer", model_of("e"), tmp_path / "out")


@pytest.mark.parametrize("name", ["eva_18b", "eva02_e_plus", "eva01_g", "eva_8b_448"])
def test_the_models_of_the_zoo_are_known_by_their_shapes(alone: Ranks, name: str) -> None:
    shapes = model_shapes(load("clip", [f"model={name}"]).model)
    tensors = {released_name(key): torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert known_models(rename(InMemory(tensors), Path("x"))) == [name]
    foreign = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    foreign["visual.trunk.x"] = torch.empty(1, device="meta")
    assert known_models(rename(InMemory(foreign), Path("x"))) == [], "the text tower's shapes are not enough"
