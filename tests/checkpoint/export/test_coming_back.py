"""What peers save after they have trained on what we exported: imported with their weights, to the bit."""

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.loss import ClipLoss
from PIL import Image
from torch import Tensor, nn

from tests.checkpoint.ours import assert_holds, features
from tests.checkpoint.peers import captions, images, model_of, released
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.released import open_released
from w2s.config.load import named_model
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError

TOLERANCE = 1e-5
"""Relative to the largest value: float32 sums over 128 products, a few layers deep."""


def export(folder: Path, model: ModelConfig, format: str, tensors: dict[str, Tensor] | None = None) -> Path:
    """Export a small CLIP, away from where it is made."""
    torch.save(released(model) if tensors is None else tensors, folder / "clip.pt")
    import_checkpoint(folder / "clip.pt", model, folder / "checkpoint")
    export_checkpoint(folder / "checkpoint", format, folder / "exported")
    return (folder / "exported").rename(folder / "moved")


def train(module: nn.Module, loss: Callable[[], Tensor]) -> torch.optim.Optimizer:
    """Take a step of AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    loss().backward()
    optimizer.step()
    return optimizer


def as_released(open_clip_names: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the released names."""
    kept = {name: value for name, value in open_clip_names.items() if name != "text.attn_mask"}
    return {
        name.replace("visual.trunk.", "visual.").replace("visual.head.proj.", "visual.head."): value
        for name, value in kept.items()
    }


@pytest.mark.parametrize("kind", ["18b", "g"])
def test_what_open_clip_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = model_of(kind)
    monkeypatch.chdir(export(tmp_path, model, "open_clip"))
    clip = open_clip.create_model("local-dir:.")
    seen = images(model)[:3], captions(model)[:3]

    def contrast() -> Tensor:
        loss: Tensor = ClipLoss()(*clip(*seen))
        return loss

    optimizer = train(clip, contrast)
    theirs = float(contrast())
    weights = {f"module.{name}": value for name, value in clip.state_dict().items()}
    saved = {"epoch": 1, "name": "tuned", "state_dict": weights, "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "epoch_1.pt")
    again = named_model("model.yaml")
    assert again == model
    import_checkpoint(tmp_path / "epoch_1.pt", again, tmp_path / "back")
    assert_holds(tmp_path / "back", as_released(clip.state_dict()))
    imported = features(tmp_path / "back", model)
    unit = [nn.functional.normalize(each[:3], dim=-1) for each in (imported.images, imported.texts)]
    assert float(ClipLoss()(*unit, imported.logit_scale.exp())) == pytest.approx(theirs, rel=TOLERANCE)


@pytest.mark.parametrize("average", [False, True])
def test_what_timm_trained_as_a_classifier(tmp_path: Path, average: bool) -> None:
    model = model_of("18b")
    exported = export(tmp_path, model, "timm")
    tower = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=10)
    ema = timm.utils.ModelEmaV3(tower) if average else None
    optimizer = train(tower, lambda: nn.functional.cross_entropy(tower(images(model)), torch.arange(3)))
    if ema:
        ema.update(tower)
    saver = timm.utils.CheckpointSaver(
        tower, optimizer, Namespace(model="vit", lr=0.01), ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(epoch=1, metric=0.5)  # as timm's own training script does
    found = import_checkpoint(tmp_path / "last.pth.tar", model, tmp_path / "back")
    assert found.surplus == ["head.weight", "head.bias"]
    weights = ema.module.state_dict() if ema else tower.state_dict()
    kept = {f"visual.{name}": value for name, value in weights.items() if not name.startswith("head.")}
    assert_holds(tmp_path / "back", kept)


def test_a_bias_that_timm_has_trained_and_we_have_no_place_for_is_named(tmp_path: Path) -> None:
    model = model_of("8b")
    tower = timm.create_model(f"local-dir:{export(tmp_path, model, 'timm')}", pretrained=True)
    train(tower, lambda: tower(images(model)).square().mean())
    torch.save(tower.state_dict(), tmp_path / "tuned.pt")
    with pytest.raises(CheckpointError, match=r"1 tensors are unexpected, such as head\.bias"):
        import_checkpoint(tmp_path / "tuned.pt", model, tmp_path / "back")
    import_checkpoint(tmp_path / "tuned.pt", model, tmp_path / "back", allowed=["head.bias"])
    assert torch.equal(open_released(tmp_path / "back").read("visual.head.weight"), tower.head.weight)


def test_what_transformers_saved_of_a_timm_export(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")
    model = model_of("18b")
    exported = export(tmp_path, model, "timm")
    tower = transformers.AutoModel.from_pretrained(exported)
    code = re.search(r"^transformers:\n\n```python\n(.*?)```", (exported / "README.md").read_text(), re.S | re.M)
    assert code is not None
    scope: dict[str, Any] = {"image": Image.new("RGB", (40, 50))}
    exec(code[1].replace("FOLDER", str(exported)), scope)
    assert scope["features"].shape == (1, model.vision.width)
    train(tower, lambda: tower(images(model)).pooler_output.square().mean())
    tower.save_pretrained(tmp_path / "tuned")
    for other in ("optimizer.pt", "training_args.bin"):  # its Trainer puts these beside the weights
        torch.save({}, tmp_path / "tuned" / other)
    import_checkpoint(tmp_path / "tuned", model, tmp_path / "back")
    weights = {name.removeprefix("timm_model."): value for name, value in tower.state_dict().items()}
    assert_holds(tmp_path / "back", {f"visual.{name}": value for name, value in weights.items()})
    torch.save({f"timm_model.{name}": value for name, value in weights.items()}, tmp_path / "older.pt")
    import_checkpoint(tmp_path / "older.pt", model, tmp_path / "older")
    assert_holds(tmp_path / "older", {f"visual.{name}": value for name, value in weights.items()})


def test_what_transformers_saved_of_a_whole_clip(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")
    model = model_of("18b")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config(model), eos_token_id=79))
    vision = transformers.AutoModel.from_pretrained(export(tmp_path, model, "timm"))
    vision.config.hidden_size = model.vision.width
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=model.embed_dim
    )
    clip = transformers.VisionTextDualEncoderModel(config, vision, text)
    inputs = {"pixel_values": images(model)[:3], "input_ids": captions(model)[:3]}
    train(clip, lambda: clip(**inputs, return_loss=True).loss)
    clip.eval().save_pretrained(tmp_path / "tuned")
    import_checkpoint(tmp_path / "tuned", model, tmp_path / "back")
    # transformers 4 names the towers inside of the towers
    nested = {"vision_model.": "vision_model.timm_model.", "text_model.": "text_model.text_model."}
    older = clip.state_dict()
    for prefix, long in nested.items():
        older = {
            name if name.startswith(long) else name.replace(prefix, long, 1) if name.startswith(prefix) else name: value
            for name, value in older.items()
        }
    torch.save(older, tmp_path / "older.bin")
    import_checkpoint(tmp_path / "older.bin", model, tmp_path / "again")
    again = open_released(tmp_path / "again")
    assert_holds(tmp_path / "back", {name: again.read(name) for name in again.meta})
    imported = features(tmp_path / "back", model)
    with torch.no_grad():
        pairs = [
            (imported.images, clip.get_image_features(pixel_values=images(model)).pooler_output),
            (imported.texts, clip.get_text_features(input_ids=captions(model)).pooler_output),
        ]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    assert imported.logit_scale == clip.logit_scale


def test_the_text_tower_of_a_clip_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="an optional package: pip install 'w2s[hf]'")
    model = model_of("g")
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**text_config(model), "eos_token_id": 79}, projection_dim=model.embed_dim
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    import_checkpoint(tmp_path / "clip", model, tmp_path / "text", allowed=["vision.*", "visual.*"])
    with torch.no_grad():
        theirs = clip.get_text_features(input_ids=captions(model)).pooler_output
    ours = features(tmp_path / "text", model, ["text"]).texts
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    assert open_released(tmp_path / "clip").meta["visual.head.weight"].shape == (model.embed_dim, 32)


def text_config(model: ModelConfig) -> dict[str, Any]:
    text = model.text
    return {
        "hidden_size": text.width, "intermediate_size": text.mlp_width, "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads, "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size, "hidden_act": "gelu",
    }  # fmt: skip
