"""Exports that transformers loads with its own classes, and what they compute there."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.checkpoint.export.formats.small_exports import features, run_snippets, small, write, write_guided
from tests.checkpoint.peers import captions, images, released
from w2s.checkpoint.export.formats.plain_vision import loaded_image_tower
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.checkpoint.weights.released import open_released
from w2s.data.samples.batch import normalize
from w2s.data.samples.tokens import tokenize
from w2s.errors import CheckpointError
from w2s.evaluation.images import view
from w2s.towers.vision import MEAN, STD

transformers = pytest.importorskip("transformers", "5", reason="an optional package: pip install 'w2s[hf]'")

CLASSES = {"18b": "VisionTextDualEncoderModel", "e": "VisionTextDualEncoderModel", "vit": "CLIPModel"}
TEXTS = ["a photo of a cat", "Two dogs, 3 cats & a café!", "word " * 40]


@pytest.mark.parametrize(("kind", "name"), CLASSES.items())
def test_features_and_logits_are_those_of_the_towers(tmp_path: Path, kind: str, name: str) -> None:
    """EVA02-E's kind has a bias after its projection, which the final norm's bias takes up."""
    model = small(kind)
    folder = write(model, "transformers", tmp_path)
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    assert type(peer).__name__ == name
    pixels, tokens = images(model), captions(model)
    with torch.no_grad():
        found = peer(pixel_values=pixels, input_ids=tokens)
    seen, read = (torch.nn.functional.normalize(each, dim=-1) for each in features(model))
    # The same weights in another order of sums, in float32.
    torch.testing.assert_close(found.image_embeds, seen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.text_embeds, read, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits_per_image, torch.tensor(2.5).exp() * seen @ read.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["e", pytest.param("vit", marks=pytest.mark.slow)])
def test_what_it_saves_again_comes_back(tmp_path: Path, kind: str) -> None:
    model = small(kind)
    peer = transformers.AutoModel.from_pretrained(write(model, "transformers", tmp_path))
    peer.save_pretrained(tmp_path / "saved")
    found = import_checkpoint(tmp_path / "saved", model, tmp_path / "checkpoint")
    assert (found.missing, found.unexpected) == ([], [])
    tower = loaded_image_tower(open_released(tmp_path / "checkpoint"), model, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(tower(images(model)), features(model)[0], atol=1e-5, rtol=1e-5)


def test_quick_gelu_goes_along(tmp_path: Path) -> None:
    model = small("vit", activation="quick_gelu")
    peer = transformers.AutoModel.from_pretrained(write(model, "transformers", tmp_path)).eval()
    with torch.no_grad():
        found = peer.get_image_features(pixel_values=images(model))
    torch.testing.assert_close(getattr(found, "pooler_output", found), features(model)[0], atol=1e-5, rtol=1e-5)


def test_the_processor_makes_our_inputs_and_the_pipeline_classifies(tmp_path: Path) -> None:
    model = small("18b")
    folder = write(model, "transformers", tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 70, 3), dtype=np.uint8))
    made = processor(text=TEXTS, images=image, return_tensors="pt", padding="max_length", truncation=True)
    ours = tokenize(TEXTS, 16)
    read = made["input_ids"].shape == ours.shape and (made["input_ids"] * made["attention_mask"] == ours).all()
    assert read, "open_clip fills up with zeros, transformers with end tokens that it masks"
    (shown,) = view([_png(image, tmp_path)], 1, [32], "crop")
    expected = normalize(shown[None], MEAN, STD)
    # torchvision's bicubic filter on bytes rounds otherwise than Pillow's, by one step of 255.
    assert float((made["pixel_values"] - expected).abs().max()) < 1.01 / 255 / min(STD)
    classify = transformers.pipeline("zero-shot-image-classification", str(folder))
    answers = classify(image, candidate_labels=["cat", "dog", "tree"])
    peer = transformers.AutoModel.from_pretrained(folder).eval()
    labels = processor(
        text=[f"This is a photo of {name}." for name in ("cat", "dog", "tree")], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        scores = peer(**labels, pixel_values=made["pixel_values"]).logits_per_image[0].softmax(-1)
    got = {answer["label"]: answer["score"] for answer in answers}
    assert [got[name] for name in ("cat", "dog", "tree")] == pytest.approx(scores.tolist(), abs=1e-6)


def _png(image: Image.Image, folder: Path) -> bytes:
    image.save(folder / "image.png")
    return (folder / "image.png").read_bytes()


def test_half_precision_keeps_the_scale(tmp_path: Path) -> None:
    folder = write(small("8b"), "transformers", tmp_path, precision="fp16")
    tensors = load_file(folder / "model.safetensors")
    assert {str(value.dtype) for name, value in tensors.items() if name != "logit_scale"} == {"torch.float16"}
    assert tensors["logit_scale"].dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_what_transformers_cannot_hold_is_one_line(tmp_path: Path) -> None:
    model = small("18b")
    with pytest.raises(CheckpointError, match=r"sigmoid loss.*--format open_clip, onnx or torch_export"):
        write(model, "transformers", tmp_path, {**released(model), "logit_bias": torch.tensor(-7.5)})
    wide = replace(small("e"), embed_dim=40)
    with pytest.raises(CheckpointError, match=r"a bias after its vision projection.*use --format open_clip"):
        write(wide, "transformers", tmp_path)
    vision = {name: value for name, value in released(model).items() if name.startswith("visual.")}
    with pytest.raises(CheckpointError, match=r"is not a whole CLIP.*--format timm"):
        write(model, "transformers", tmp_path, vision)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["18b", "vit"])
def test_the_cards_lines_work(tmp_path: Path, kind: str) -> None:
    loaded, classified = run_snippets(*write_guided(small(kind), "transformers", tmp_path))
    assert tuple(loaded["probabilities"].shape) == (1, 2)
    assert classified["answers"][0]["label"] in ("cat", "dog")


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, pipeline
given = load_file(f"{sys.argv[1]}/in.safetensors")
model = AutoModel.from_pretrained(f"{sys.argv[1]}/moved").eval()
AutoProcessor.from_pretrained(f"{sys.argv[1]}/moved")
with torch.no_grad():
    found = model(pixel_values=given["images"], input_ids=given["captions"])
save_file({"images": found.image_embeds, "texts": found.text_embeds}, f"{sys.argv[1]}/out.safetensors")
assert not any(name.split(".")[0] in ("w2s", "megatron", "open_clip") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["18b", "8b", "e", "g", "vit"])
def test_a_moved_folder_loads_in_a_fresh_process(tmp_path: Path, kind: str) -> None:
    model = small(kind)
    write(model, "transformers", tmp_path).rename(tmp_path / "moved")
    save_file({"images": images(model), "captions": captions(model)}, tmp_path / "in.safetensors")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    for name, value in zip(("images", "texts"), features(model), strict=True):
        expected = torch.nn.functional.normalize(value, dim=-1)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


def test_open_clips_tokenizer_is_the_one_beside_it(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    folder = write(small("8b"), "transformers", tmp_path)
    rows = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(TEXTS)
    assert [row.ids for row in rows] == open_clip.get_tokenizer("ViT-B-32")(TEXTS, context_length=16).tolist()
