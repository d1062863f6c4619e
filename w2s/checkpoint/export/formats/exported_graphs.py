"""Both towers of a CLIP as graphs for servers: what ONNX and torch.export have in common.

| file              | in                                                          | out                           |
|-------------------|-------------------------------------------------------------|-------------------------------|
| `vision_model.*`  | `pixel_values`, float32 [n, 3, side, side]                  | `image_embeds`, float32 [n, d] |
| `text_model.*`    | `input_ids`, int64 [n, context length], zeros after the end | `text_embeds`, float32 [n, d] |

n may be any number. Embeddings are as the towers give them, not normalised. Names are those of the ONNX files that
transformers' own clients read. `clip.json` has the sizes, and the scale of the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from w2s.checkpoint.export.formats.base import Export, write_json
from w2s.checkpoint.export.formats.plain_text import loaded_text_tower
from w2s.checkpoint.export.formats.plain_vision import loaded_image_tower
from w2s.checkpoint.export.formats.processor import write_processor
from w2s.checkpoint.export.formats.transformers import require_clip


@dataclass(frozen=True)
class Graph:
    """A tower to be traced."""

    file: str
    """Name of its file, without the ending."""
    module: nn.Module
    """From one tensor to one tensor."""
    example: Tensor
    """A batch that it takes."""
    input: str
    """Name of what goes in."""
    output: str
    """Name of what comes out."""


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


def write_graphs(export: Export, folder: Path, save: Callable[[Graph, Path], None]) -> None:
    """Write both towers, what makes their inputs, and `clip.json`.

    Args:
        export: the CLIP.
        folder: where to.
        save: writes a tower.

    Raises:
        CheckpointError: it is not a whole CLIP.
    """
    require_clip(export.released, "a server")
    for graph in _graphs(export):
        save(graph, folder)
    write_processor(folder, export.model)
    write_json(folder / "clip.json", _about(export))


def dtype_of(export: Export) -> torch.dtype:
    """Return the type that the towers compute in: that of the patch embedding."""
    return export.released.meta["visual.patch_embed.proj.weight"].dtype


def traced(graph: Graph) -> ExportedProgram:
    """Return the operations of a tower on any number of samples, without the lines of code that they come from."""
    shapes = {graph.input: {0: Dim("batch", min=1)}}
    program = torch.export.export(graph.module.eval(), (graph.example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _graphs(export: Export) -> list[Graph]:
    released, model, dtype = export.released, export.model, dtype_of(export)
    side, length = model.vision.image_size, model.text.context_length
    images = _Images(loaded_image_tower(released, model, dtype), dtype)
    texts = _Texts(loaded_text_tower(released, model, dtype))
    return [
        # Examples of two: a size of one would be taken for a constant.
        Graph("vision_model", images, torch.zeros(2, 3, side, side), "pixel_values", "image_embeds"),
        Graph("text_model", texts, torch.zeros(2, length, dtype=torch.int64), "input_ids", "text_embeds"),
    ]


def _about(export: Export) -> dict[str, object]:
    released, model = export.released, export.model
    bias = {"logit_bias": float(released.read("logit_bias"))} if "logit_bias" in released.meta else {}
    return {
        "model": model.name,
        "embed_dim": model.embed_dim,
        "image_size": model.vision.image_size,
        "context_length": model.text.context_length,
        "logit_scale": float(released.read("logit_scale").float().exp()),
        **bias,
    }
