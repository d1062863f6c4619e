"""`w2s encode`: the features are the peer's, whatever the batches, the ranks and the layout."""

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.peers import masked_stage, released, text_tower, timm_tower
from tests.data.shard_files import smooth_photo, write_shard
from tests.distributed import run_ranks
from tests.stages.shape_images import write_shapes
from w2s import cli
from w2s.checkpoint.weights.importing import import_checkpoint
from w2s.config.load import named_model
from w2s.config.sections import ModelConfig, Resize
from w2s.data.samples.batch import normalize
from w2s.data.samples.tokens import tokenize
from w2s.evaluation.encode import EncodeJob, configured, run
from w2s.evaluation.images import eval_transform
from w2s.towers.vision import MEAN, STD

TEXTS = ["a red circle", "a dog", "two green squares on a table"]
TOLERANCE = 1e-5
"""Relative to the largest value: float32 sums in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, as imported and as the file; a masked student; seven pictures of 32 px; texts; a shard."""
    folder, model = tmp_path_factory.mktemp("encode"), named_model("tiny")
    torch.save(released(model), folder / "clip.pt")
    import_checkpoint(folder / "clip.pt", model, folder / "clip")
    student = {name: value for name, value in timm_tower(model).state_dict().items() if not name.startswith("head")}
    torch.save({**student, **masked_stage()}, folder / "mim.pt")
    import_checkpoint(folder / "mim.pt", model, folder / "mim")
    (folder / "images").mkdir()
    for index, picture in enumerate(pictures()):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / "images" / f"{index}.png")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    write_shapes(folder / "shards", shards=1, seed=0)
    return folder


def pictures() -> Tensor:
    return torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def expected(model: ModelConfig) -> tuple[Tensor, Tensor]:
    seen = normalize(pictures(), MEAN, STD)
    return timm_tower(model)(seen), text_tower(model)(tokenize(TEXTS, model.text.context_length))


def encode(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["w2s", "encode", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def assert_close(found: Tensor, value: Tensor) -> None:
    assert found.shape == value.shape
    assert (found - value).abs().max() <= TOLERANCE * value.abs().max()


@pytest.mark.parametrize("source", ["clip", "clip.pt"])
def test_features_of_images_and_texts(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    out = folder / f"{source}.safetensors"
    asked = ["--images", str(folder / "images" / "*.png"), "--texts", str(folder / "texts.txt"), "--batch-size", "3"]
    model = ["--model", "tiny"] if source == "clip.pt" else []
    assert encode(monkeypatch, str(folder / source), *asked, *model, "--out", str(out), "hardware=cpu") == 0
    found, (image_features, text_features) = load_file(out), expected(named_model("tiny"))
    assert_close(found["image_features"], image_features)
    assert_close(found["text_features"], text_features)
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert json.loads(about["texts"]) == TEXTS
    assert json.loads(about["image_names"]) == [str(folder / "images" / f"{index}.png") for index in range(7)]


def test_a_masked_run_gives_the_mean_of_its_patch_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "mim.safetensors"
    assert encode(monkeypatch, str(folder / "mim"), "--images", str(folder / "images" / "*"), "--out", str(out)) == 0
    tower = timm_tower(named_model("tiny"))
    with torch.no_grad():
        tokens = tower.forward_features(normalize(pictures(), MEAN, STD))[:, 1:]
    assert_close(load_file(out)["image_features"], tokens.mean(1))


def test_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "shards.safetensors"
    assert encode(monkeypatch, str(folder / "clip"), "--images", str(folder / "shards"), "--out", str(out)) == 0
    features = load_file(out)["image_features"]
    assert features.shape == (24, 16)
    assert (F.cosine_similarity(features[:1], features[1:]) < 1 - 1e-6).all()


def test_a_clip_is_the_mean_of_its_frames(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [(folder / "images" / f"{index}.png").read_bytes() for index in range(7)]
    clip, image = {f"{index:03d}.png": data for index, data in enumerate(images)}, {"png": images[0]}
    write_shard(folder / "clips.tar", [("clip", clip), ("image", image)])
    out = folder / "clips.safetensors"
    asked = ["--images", str(folder / "clips.tar"), "--out", str(out), "data.frames=2"]
    assert encode(monkeypatch, str(folder / "clip"), *asked) == 0
    features = expected(named_model("tiny"))[0]
    # Frames 1 and 5 are in the middles of the halves.
    assert_close(load_file(out)["image_features"], torch.stack([features[[1, 5]].mean(0), features[0]]))


def test_pictures_are_squashed_where_that_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "wide").mkdir()
    photo = smooth_photo(40, 80)
    Image.fromarray(photo).save(folder / "wide" / "0.png")
    asked = [str(folder / "clip"), "--images", str(folder / "wide" / "*"), "--out", str(folder / "wide.safetensors")]
    tower, pixels = timm_tower(named_model("tiny")), torch.from_numpy(photo).permute(2, 0, 1)
    for how in get_args(Resize):
        assert encode(monkeypatch, *asked, f"eval.resize={how}") == 0
        with torch.no_grad():
            features = tower(normalize(eval_transform(pixels, 32, how)[None], MEAN, STD))
        assert_close(load_file(folder / "wide.safetensors")["image_features"], features)


def on_two_ranks(folder: Path) -> None:
    import torch.distributed as dist

    from w2s.megatron.parallel import process_groups

    process_groups.init_distributed = lambda parallel, hardware: process_groups.initialize_groups(
        parallel, torch.device("cpu")
    )  # type: ignore[assignment]
    for name, layout in {"data": [], "tensor": ["parallel.tensor=2"], "pipeline": ["parallel.pipeline=2"]}.items():
        config = configured(folder / "clip", None, ["hardware=cpu", *layout], dist.get_world_size())
        images, out = str(folder / "images" / "*.png"), folder / f"{name}.safetensors"
        run(EncodeJob(folder / "clip", config, images, folder / "texts.txt", out, batch_size=2))


def test_every_layout_gives_the_same_features(folder: Path) -> None:
    run_ranks(on_two_ranks, 2, folder)
    image_features, text_features = expected(named_model("tiny"))
    for name in ("data", "tensor", "pipeline"):
        found = load_file(folder / f"{name}.safetensors")
        assert_close(found["image_features"], image_features)
        assert_close(found["text_features"], text_features)


def test_mistakes_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "0.png").write_bytes(b"no picture")
    images, texts, out = str(folder / "images" / "*.png"), str(folder / "texts.txt"), str(folder / "never.safetensors")
    mistakes = {
        "does not say what it is: give --model tiny": [str(folder / "clip.pt"), "--images", images],
        "has no text tower": [str(folder / "mim"), "--texts", texts],
        "has no shards": [str(folder / "clip"), "--images", str(folder / "nothing" / "*.png")],
        f"for its pictures give '{folder}/images/*.jpg'": [str(folder / "clip"), "--images", str(folder / "images")],
        "0.png: ": [str(folder / "clip"), "--images", str(folder / "broken" / "*.png")],
        "CHECKPOINT=nowhere is neither a path": ["nowhere", "--images", images],
        "is a text tower alone": [str(folder / "text.pt"), "--model", "tiny", "--texts", texts],
        "asks for nothing": [str(folder / "clip")],
    }
    clip = torch.load(folder / "clip.pt", weights_only=True)
    torch.save({name: value for name, value in clip.items() if name.startswith("text.")}, folder / "text.pt")
    for line, arguments in mistakes.items():
        assert encode(monkeypatch, *arguments, "--out", out) == 2
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    assert not Path(out).exists()


def test_a_place_that_cannot_be_written_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("w2s.evaluation.encode.hand_over", None)  # nothing is loaded before
    for out, line in ((folder, "is a folder"), (folder / "clip.pt" / "x.safetensors", "cannot be written")):
        assert encode(monkeypatch, str(folder / "clip"), "--texts", str(folder / "texts.txt"), "--out", str(out)) == 2
        error = capsys.readouterr().err
        assert f"--out {out} {line}" in error and error.count("\n") == 1
    assert not list(folder.parent.glob(".*.partial"))
