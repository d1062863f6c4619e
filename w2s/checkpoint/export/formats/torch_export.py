"""Both towers of a CLIP as `torch.export.load` reads them: torch is all that they need."""

from pathlib import Path

import torch

from w2s.checkpoint.export.formats.base import EMBEDS_BOTH, Export, Guide, Snippet
from w2s.checkpoint.export.formats.exported_graphs import Graph, traced, write_graphs
from w2s.checkpoint.export.formats.processor import LIMITS

IMAGES = """\
import torch
from transformers import CLIPImageProcessor
pixels = CLIPImageProcessor.from_pretrained("FOLDER")(image, return_tensors="pt")["pixel_values"]
embeddings = torch.export.load("FOLDER/vision_model.pt2").module()(pixels)"""
TEXTS = """\
import tokenizers, torch
encode = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json").encode_batch
tokens = torch.tensor([each.ids for each in encode(["a cat", "a dog"])])
embeddings = torch.export.load("FOLDER/text_model.pt2").module()(tokens)"""


def write(export: Export, folder: Path) -> Guide:
    """Write vision_model.pt2 and text_model.pt2, and what makes their inputs.

    Raises:
        CheckpointError: it is not a whole CLIP.
    """
    write_graphs(export, folder, _save)
    snippets = [Snippet("torch, images", IMAGES), Snippet("torch, texts", TEXTS)]
    return Guide("pytorch", EMBEDS_BOTH, snippets, LIMITS, comes_back=False)


def _save(graph: Graph, folder: Path) -> None:
    torch.export.save(traced(graph), folder / f"{graph.file}.pt2")
