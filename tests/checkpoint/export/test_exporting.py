"""Our checkpoints as other programs' folders: they load them with their own calls, and compute the same."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.peers import captions, images, model_of, released, text_tower, timm_tower
from w2s.checkpoint.export.exporting import export_checkpoint
from w2s.checkpoint.export.formats.timm import named_tower, timm_config
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.load import load
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError, ConfigError

KINDS = ("18b", "8b", "e", "g")

LOAD_ELSEWHERE = r"""
import os, re, sys, torch, timm, open_clip
from PIL import Image
from safetensors.torch import load_file, save_file

def as_the_card_says(folder, peer, lines=4):
    text = open(f"{folder}/README.md").read()
    code = re.search(rf"^{peer}:\n\n```python\n(.*?)\n```", text, re.S | re.M)[1].replace("FOLDER", folder)
    scope = {"image": Image.new("RGB", (40, 50))}
    exec("\n".join(code.splitlines()[:lines]), scope)
    return scope

for folder in sys.argv[1:]:
    given = load_file(f"{folder}/in.safetensors")
    os.chdir("/")
    with torch.no_grad():
        tower = as_the_card_says(f"{folder}/moved/timm", "timm")["tower"]
        scope = as_the_card_says(f"{folder}/moved/open_clip", "open_clip, from anywhere")
        anywhere, preprocess = scope["model"].eval(), scope["preprocess"]
        os.chdir(f"{folder}/moved/open_clip")
        clip = as_the_card_says(".", "open_clip, in the folder", lines=3)["model"].eval()  # the vocabulary is cut
        tokens = open_clip.get_tokenizer("local-dir:.")(["a cat"])
        save_file({
            "timm": tower(given["images"]),
            "images": clip.encode_image(given["images"]),
            "anywhere": anywhere.encode_image(given["images"]),
            "texts": clip.encode_text(given["captions"]),
            "scale": clip.logit_scale.detach(),
            "length": torch.tensor(tokens.shape[1]),
            "side": torch.tensor(preprocess.transforms[0].size),
        }, f"{folder}/out.safetensors")
assert not any(name.split(".")[0] in ("w2s", "megatron") for name in sys.modules)
"""


def checkpoint_of(model: ModelConfig, folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    torch.save(released(model) if tensors is None else tensors, folder / "clip.pt")
    import_checkpoint(folder / "clip.pt", model, folder / "checkpoint")
    return folder / "checkpoint"


def test_timm_and_open_clip_compute_the_same_without_w2s(tmp_path: Path) -> None:
    folders = {kind: tmp_path / kind for kind in (*KINDS, "siglip")}
    for kind, folder in folders.items():
        folder.mkdir()
        model = model_of(kind)
        checkpoint = checkpoint_of(model, folder)
        for format in ("timm", "open_clip"):
            export_checkpoint(checkpoint, format, folder / format)
            (folder / "moved").mkdir(exist_ok=True)
            (folder / format).rename(folder / "moved" / format)
        save_file({"images": images(model), "captions": captions(model)}, folder / "in.safetensors")
    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *map(str, folders.values())], check=True, cwd=tmp_path)
    for kind, folder in folders.items():
        model = model_of(kind)
        found = load_file(folder / "out.safetensors")
        with torch.no_grad():
            expected = timm_tower(model)(images(model))
            texts = text_tower(model)(captions(model))
        # the same library and the same weights: what may differ is the order of sums in another attention kernel
        for name, value in (("timm", expected), ("images", expected), ("anywhere", expected), ("texts", texts)):
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
        assert found["scale"] == 2.5
        assert found["length"] == model.text.context_length
        assert found["side"].tolist() in (model.vision.image_size, [model.vision.image_size] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_exports_for_eva_and_of_safetensors_have_the_released_names_and_values(tmp_path: Path, kind: str) -> None:
    model = model_of(kind)
    original = {name: value.to(torch.bfloat16) for name, value in released(model).items()}
    checkpoint = checkpoint_of(model, tmp_path, original)
    export_checkpoint(checkpoint, "eva", tmp_path / "eva")
    export_checkpoint(checkpoint, "safetensors", tmp_path / "plain")
    for exported in (
        torch.load(tmp_path / "eva" / f"{model.name}.pt", weights_only=True),
        load_file(tmp_path / "plain" / "model.safetensors"),
    ):
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[name], value) for name, value in original.items())
    config = json.loads((tmp_path / "eva" / f"{model.name}.json").read_text())
    assert int(config["vision_cfg"]["mlp_ratio"] * config["vision_cfg"]["width"]) == model.vision.mlp_width
    assert config["vision_cfg"]["postnorm"] == (kind in ("18b", "e"))


def test_a_masked_student_is_a_timm_model_without_a_head(tmp_path: Path) -> None:
    model = model_of("18b")
    tower = timm_tower(model)
    student = {name: value for name, value in tower.state_dict().items() if not name.startswith("head")}
    student |= {
        "mask_token": torch.randn(1, 1, 32),
        "lm_head.weight": torch.randn(24, 32),
        "lm_head.bias": torch.ones(24),
    }
    checkpoint = checkpoint_of(model, tmp_path, student)
    export_checkpoint(checkpoint, "timm", tmp_path / "timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        tokens, expected = peer.forward_features(images(model)), tower.forward_features(images(model))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    assert peer.num_classes == 0
    with pytest.raises(CheckpointError, match="is not a whole CLIP"):
        export_checkpoint(checkpoint, "open_clip", tmp_path / "no")
    assert not [path for path in tmp_path.iterdir() if "no" in path.name]


def test_the_bias_of_the_sigmoid_loss_goes_to_open_clip_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("18b")
    checkpoint = checkpoint_of(model, tmp_path, {**released(model), "logit_bias": torch.tensor(-7.5)})
    export_checkpoint(checkpoint, "open_clip", tmp_path / "open_clip")
    monkeypatch.chdir(tmp_path / "open_clip")
    assert open_clip.create_model("local-dir:.").logit_bias == -7.5
    with pytest.raises(CheckpointError, match="sigmoid loss"):
        export_checkpoint(checkpoint, "eva", tmp_path / "eva")
    assert not (tmp_path / "eva").exists()


def test_open_clip_finds_a_tower_that_it_has_no_name_for_on_the_hub(tmp_path: Path) -> None:
    model = model_of("18b")
    export_checkpoint(checkpoint_of(model, tmp_path), "open_clip", tmp_path / "out", hub="owner/name")
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    # what timm reads of hf-hub:owner/name is the folder's own config.json
    assert config["vision_cfg"]["timm_model_name"] == "hf-hub:owner/name"
    tower = timm.create_model(f"local-dir:{tmp_path / 'out'}")
    assert (tower.num_classes, tower.num_features) == (0, model.vision.width)
    assert 'create_model_and_transforms("hf-hub:owner/name")' in (tmp_path / "out" / "README.md").read_text()


def test_shapes_that_timm_knows_are_called_by_name() -> None:
    names = {
        "eva02_e_plus": "eva02_enormous_patch14_clip_224",
        "eva01_g": "eva_giant_patch14_clip_224",
        "eva_18b": None,
    }
    for name, expected in names.items():
        model = load("clip", [f"model={name}"]).model
        assert named_tower(model.vision) == expected
        args = timm_config(model.vision, model.embed_dim)["model_args"]
        assert int(args["mlp_ratio"] * args["embed_dim"]) == model.vision.mlp_width


def test_what_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    model = model_of("18b")
    checkpoint = checkpoint_of(model, tmp_path)
    with pytest.raises(ConfigError, match="--format caffe does not exist: use eva, open_clip, timm, safetensors"):
        export_checkpoint(checkpoint, "caffe", tmp_path / "out")
    with pytest.raises(ConfigError, match="--hub nobody is not a name of a hub: use OWNER/NAME"):
        export_checkpoint(checkpoint, "eva", tmp_path / "out", hub="nobody")
    with pytest.raises(ConfigError, match="--license Apache 2 is not a licence as a hub calls it: use apache-2"):
        export_checkpoint(checkpoint, "eva", tmp_path / "out", licence="Apache 2")
    with pytest.raises(CheckpointError, match=r"clip\.pt is not a checkpoint of w2s: make one of it with `w2s import`"):
        export_checkpoint(tmp_path / "clip.pt", "eva", tmp_path / "out")
    next((checkpoint).glob("*.distcp")).write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"is damaged: __0_0\.distcp has 4 of") as error:
        export_checkpoint(checkpoint, "safetensors", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_card_says_what_the_folder_holds(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(model_of("18b"), tmp_path)
    texts = {}
    for format in ("open_clip", "timm", "torch_export"):
        export_checkpoint(checkpoint, format, tmp_path / format)
        texts[format] = (tmp_path / format / "README.md").read_text()
    whole, vision = texts["open_clip"], texts["timm"]
    held = load_file(tmp_path / "timm" / "model.safetensors")
    assert not held.pop("head.bias").any(), "timm's head has one, EVA's has not"
    assert f" {sum(tensor.numel() for tensor in held.values()):,} parameters" in vision
    assert "A vision tower, " in vision and "A CLIP, " in whole and "Text: " not in vision
    assert ["w2s import" in text for text in texts.values()] == [True, True, False], "graphs do not come back"


def test_the_card_of_an_export(tmp_path: Path) -> None:
    model = model_of("18b")
    out = tmp_path / "out"
    export_checkpoint(checkpoint_of(model, tmp_path), "open_clip", out, hub="owner/name", licence="apache-2.0")
    text = (out / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["library_name"]) == ("apache-2.0", "open_clip")
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert str(tmp_path) not in text
    assert "| weights | clip.pt |" in text
    for path in out.iterdir():
        if path.name != "README.md":
            assert f"| {path.name} | {path.stat().st_size} | {hashlib.sha256(path.read_bytes()).hexdigest()} |" in text
    assert yaml.safe_load((out / "model.yaml").read_text())["model"]["vision"]["norm_placement"] == "post"
