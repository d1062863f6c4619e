"""Both towers of a CLIP for ONNX Runtime, each with its weights in a file beside it."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from w2s.checkpoint.export.formats.base import EMBEDS_BOTH, Export, Guide, Snippet
from w2s.checkpoint.export.formats.exported_graphs import Graph, dtype_of, traced, write_graphs
from w2s.checkpoint.export.formats.processor import LIMITS
from w2s.errors import CheckpointError, MissingPackageError

IMAGES = """\
from onnxruntime import InferenceSession
from transformers import CLIPImageProcessor
pixels = CLIPImageProcessor.from_pretrained("FOLDER")(image, return_tensors="np")["pixel_values"]
(embeddings,) = InferenceSession("FOLDER/vision_model.onnx").run(None, {"pixel_values": pixels})"""
TEXTS = """\
import numpy, onnxruntime, tokenizers
encode = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json").encode_batch
tokens = numpy.array([each.ids for each in encode(["a cat", "a dog"])], dtype="int64")
(embeddings,) = onnxruntime.InferenceSession("FOLDER/text_model.onnx").run(None, {"input_ids": tokens})"""


def write(export: Export, folder: Path) -> Guide:
    """Write vision_model.onnx and text_model.onnx, and what makes their inputs.

    Raises:
        CheckpointError: it is not a whole CLIP, or in bfloat16, which ONNX Runtime does not multiply in.
        MissingPackageError: onnx or onnxscript is not installed.
    """
    if missing := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise MissingPackageError(f"--format onnx needs {' and '.join(missing)}: pip install 'w2s[onnx]'")
    if export.released.has("visual") and dtype_of(export) == torch.bfloat16:
        raise CheckpointError(
            f"{export.released.path} is in bfloat16, which ONNX Runtime does not multiply in: "
            "add --precision fp32 or fp16"
        )
    write_graphs(export, folder, _save)
    snippets = [Snippet("ONNX Runtime, images", IMAGES), Snippet("ONNX Runtime, texts", TEXTS)]
    return Guide("onnx", EMBEDS_BOTH, snippets, LIMITS, comes_back=False)


def _save(graph: Graph, folder: Path) -> None:
    traced_graph = traced(graph)
    with warnings.catch_warnings():
        # torch copies the program by a class that it is about to rename: nothing that a user could change.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program: Any = torch.onnx.export(
            traced_graph, (), input_names=[graph.input], output_names=[graph.output], dynamo=True, verbose=False
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(folder / f"{graph.file}.onnx", external_data=True)
