"""Both towers of a CLIP as graphs for servers: for ONNX Runtime, and for `torch.export.load`, which needs torch alone.

| file              | in                                                          | out                           |
|-------------------|-------------------------------------------------------------|-------------------------------|
| `vision_model.*`  | `pixel_values`, float32 [n, 3, side, side]                  | `image_embeds`, float32 [n, d] |
| `text_model.*`    | `input_ids`, int64 [n, context length], zeros after the end | `text_embeds`, float32 [n, d] |

n may be any number. Embeddings are as the towers give them, not normalised. Names are those of the ONNX files that
transformers' own clients read. `clip.json` has the sizes, and the scale of the logits.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from w2s.checkpoint.export.formats.base import EMBEDS_BOTH, Export, Guide, Snippet, write_json
from w2s.checkpoint.export.formats.plain_text import loaded_text_tower
from w2s.checkpoint.export.formats.plain_vision import loaded_image_tower
from w2s.checkpoint.export.formats.processor import LIMITS, write_processor
from w2s.checkpoint.export.formats.transformers import require_clip
from w2s.errors import CheckpointError, MissingPackageError

ONNX_IMAGES = """\
from onnxruntime import InferenceSession
from transformers import CLIPImageProcessor
pixels = CLIPImageProcessor.from_pretrained("FOLDER")(image, return_tensors="np")["pixel_values"]
(embeddings,) = InferenceSession("FOLDER/vision_model.onnx").run(None, {"pixel_values": pixels})"""
ONNX_TEXTS = """\
import numpy, onnxruntime, tokenizers
encode = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json").encode_batch
tokens = numpy.array([each.ids for each in encode(["a cat", "a dog"])], dtype="int64")
(embeddings,) = onnxruntime.InferenceSession("FOLDER/text_model.onnx").run(None, {"input_ids": tokens})"""
TORCH_IMAGES = """\
import torch
from transformers import CLIPImageProcessor
pixels = CLIPImageProcessor.from_pretrained("FOLDER")(image, return_tensors="pt")["pixel_values"]
embeddings = torch.export.load("FOLDER/vision_model.pt2").module()(pixels)"""
TORCH_TEXTS = """\
import tokenizers, torch
encode = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json").encode_batch
tokens = torch.tensor([each.ids for each in encode(["a cat", "a dog"])])
embeddings = torch.export.load("FOLDER/text_model.pt2").module()(tokens)"""


class _Images(nn.Module):
    """Pixels in, embeddings out, both in float32, whatever the tower computes in."""

    def __init__(self, tower: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tower, self.dtype = tower, dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.tower(pixel_values.to(self.dtype)).float()


class _Texts(nn.Module):
    """Token numbers in, embeddings out, in float32."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tower(input_ids).float()


def write_torch_export(export: Export, folder: Path) -> Guide:
    """Write vision_model.pt2 and text_model.pt2, and what makes their inputs.

    Raises:
        CheckpointError: it is not a whole CLIP.
    """

    def save(program: ExportedProgram, name: str, inputs: str, outputs: str) -> None:
        torch.export.save(program, folder / f"{name}.pt2")

    _write(export, folder, save)
    snippets = [Snippet("torch, images", TORCH_IMAGES), Snippet("torch, texts", TORCH_TEXTS)]
    return Guide("pytorch", EMBEDS_BOTH, snippets, LIMITS, comes_back=False)


def write_onnx(export: Export, folder: Path) -> Guide:
    """Write vision_model.onnx and text_model.onnx, each with its weights in a file beside it, and their inputs' makers.

    Raises:
        CheckpointError: it is not a whole CLIP, or in bfloat16, which ONNX Runtime does not multiply in.
        MissingPackageError: onnx or onnxscript is not installed.
    """
    if missing := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise MissingPackageError(f"--format onnx needs {' and '.join(missing)}: pip install 'w2s[onnx]'")
    if export.released.has("visual") and _dtype_of(export) == torch.bfloat16:
        raise CheckpointError(
            f"{export.released.path} is in bfloat16, which ONNX Runtime does not multiply in: "
            "add --precision fp32 or fp16"
        )

    def save(traced: ExportedProgram, name: str, inputs: str, outputs: str) -> None:
        with warnings.catch_warnings():
            # torch copies the program by a class that it is about to rename: nothing that a user could change.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            program: Any = torch.onnx.export(
                traced, (), input_names=[inputs], output_names=[outputs], dynamo=True, verbose=False
            )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        program.save(folder / f"{name}.onnx", external_data=True)

    _write(export, folder, save)
    snippets = [Snippet("ONNX Runtime, images", ONNX_IMAGES), Snippet("ONNX Runtime, texts", ONNX_TEXTS)]
    return Guide("onnx", EMBEDS_BOTH, snippets, LIMITS, comes_back=False)


def _write(export: Export, folder: Path, save: Callable[[ExportedProgram, str, str, str], None]) -> None:
    """Write both towers, what makes their inputs, and `clip.json`.

    Args:
        export: the CLIP.
        folder: where to.
        save: writes a tower, given the names of its file, its input and its output.
    """
    released, model = export.released, export.model
    require_clip(released, "a server")
    dtype, side = _dtype_of(export), model.vision.image_size
    images = _Images(loaded_image_tower(released, model, dtype), dtype)
    texts = _Texts(loaded_text_tower(released, model, dtype))
    # Examples of two: a size of one would be taken for a constant.
    tokens = torch.zeros(2, model.text.context_length, dtype=torch.int64)
    save(_traced(images, torch.zeros(2, 3, side, side), "pixel_values"), "vision_model", "pixel_values", "image_embeds")
    save(_traced(texts, tokens, "input_ids"), "text_model", "input_ids", "text_embeds")
    write_processor(folder, model)
    bias = {"logit_bias": float(released.read("logit_bias"))} if "logit_bias" in released.meta else {}
    about = {
        "model": model.name,
        "embed_dim": model.embed_dim,
        "image_size": side,
        "context_length": model.text.context_length,
        "logit_scale": float(released.read("logit_scale").float().exp()),
        **bias,
    }
    write_json(folder / "clip.json", about)


def _dtype_of(export: Export) -> torch.dtype:
    """The type that the towers compute in: that of the patch embedding."""
    return export.released.meta["visual.patch_embed.proj.weight"].dtype


def _traced(module: nn.Module, example: Tensor, inputs: str) -> ExportedProgram:
    """The operations of a tower on any number of samples, without the lines of code that they come from."""
    program = torch.export.export(module.eval(), (example,), dynamic_shapes={inputs: {0: Dim("batch", min=1)}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
