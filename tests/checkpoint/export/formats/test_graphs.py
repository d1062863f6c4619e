"""Exports for servers: graphs of both towers that compute the same on batches of any size."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.checkpoint.export.formats.small_exports import features, run_snippets, small, write, write_guided
from tests.checkpoint.peers import captions, images, released, text_tower
from w2s.data.samples.tokens import tokenize
from w2s.errors import CheckpointError, ConfigError, MissingPackageError

NEEDS = "an optional package: pip install 'w2s[onnx]'"
FILES = ("vision_model", "text_model")


def inputs(kind: str) -> list[Tensor]:
    model = small(kind)
    return [images(model), captions(model)]


@pytest.mark.parametrize("kind", ["vit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("e", "siglip"))])
def test_torch_export_gives_the_same(tmp_path: Path, kind: str) -> None:
    tensors = {**released(small(kind)), "logit_bias": torch.tensor(-7.5)}
    folder = write(small(kind), "torch_export", tmp_path, tensors)
    for file, given, expected in zip(FILES, inputs(kind), features(small(kind)), strict=True):
        graph = torch.export.load(folder / f"{file}.pt2").module()
        # A pool's one query goes through another attention kernel.
        error = 1e-6 if kind == "siglip" and file == "vision_model" else 0
        torch.testing.assert_close(graph(given), expected, atol=error, rtol=error)
        torch.testing.assert_close(graph(given[:1]), expected[:1], atol=1e-6, rtol=1e-5)
    about = json.loads((folder / "clip.json").read_text())
    assert about["logit_scale"] == pytest.approx(12.1825, abs=1e-4)
    assert about["logit_bias"] == -7.5
    assert (about["image_size"], about["context_length"], about["embed_dim"]) == (32, 16, small(kind).embed_dim)
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} names a folder of this machine"


@pytest.mark.slow
def test_half_precision_is_close(tmp_path: Path) -> None:
    folder = write(small("18b"), "torch_export", tmp_path, precision="bf16")
    for file, given, expected in zip(FILES, inputs("18b"), features(small("18b")), strict=True):
        found = torch.export.load(folder / f"{file}.pt2").module()(given)
        assert found.dtype == torch.float32
        # bfloat16 has eight bits; errors of two layers add up to a few of its steps.
        assert 0 < float((found - expected).abs().max() / expected.abs().max()) < 2**-5


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    model = small("18b")
    vision = {name: value for name, value in released(model).items() if name.startswith("visual.")}
    with pytest.raises(CheckpointError, match="is not a whole CLIP, which is what a server gets"):
        write(model, "torch_export", tmp_path, vision)
    with pytest.raises(ConfigError, match="--precision int8 does not exist: use fp32, fp16, bf16"):
        write(model, "torch_export", tmp_path, precision="int8")
    with (
        mock.patch("w2s.checkpoint.export.formats.graphs.find_spec", lambda name: None),
        pytest.raises(MissingPackageError, match=r"needs onnx and onnxscript: pip install 'w2s\[onnx\]'"),
    ):
        write(model, "onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"), [("18b", ""), ("e", ""), ("g", ""), ("vit", ""), ("siglip", ""), ("8b", "fp16")]
)
def test_onnx_runtime_gives_the_same(
    tmp_path: Path, kind: str, precision: str, recwarn: pytest.WarningsRecorder
) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=NEEDS)
    onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS)
    folder = write(small(kind), "onnx", tmp_path, precision=precision)
    assert not [each for each in recwarn if each.category is FutureWarning]
    tolerance = 5e-3 if precision else 1e-4  # half a step of float16 is 5e-4; errors of two layers add up
    for file, given, expected in zip(FILES, inputs(kind), features(small(kind)), strict=True):
        session = onnxruntime.InferenceSession(folder / f"{file}.onnx", providers=["CPUExecutionProvider"])
        (name,) = (each.name for each in session.get_inputs())
        for count in (1, len(given)):
            (found,) = session.run(None, {name: given[:count].numpy()})
            assert float((torch.from_numpy(found) - expected[:count]).abs().max()) < tolerance
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and sys.prefix.encode() not in content


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch_export", "onnx"])
def test_the_cards_lines_work(tmp_path: Path, format: str) -> None:
    for package in ("transformers", *(("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ())):
        pytest.importorskip(package, reason=NEEDS)
    seen, read = run_snippets(*write_guided(small("18b"), format, tmp_path))
    assert tuple(seen["embeddings"].shape) == (1, 16)
    tokens = tokenize(["a cat", "a dog"], 16)
    with torch.no_grad():
        expected = text_tower(small("18b"))(tokens)
    torch.testing.assert_close(torch.as_tensor(read["embeddings"]), expected, atol=1e-4, rtol=1e-4)


def test_onnx_in_bfloat16_is_refused(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=NEEDS)
    with pytest.raises(CheckpointError, match=r"in bfloat16.*add --precision fp32 or fp16"):
        write(small("8b"), "onnx", tmp_path, precision="bf16")
