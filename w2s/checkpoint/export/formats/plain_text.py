"""The text tower of a CLIP as a module of open_clip, which needs no Megatron: for servers, and teachers' embeddings."""

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import nn

from w2s.checkpoint.export.formats.open_clip import text_config
from w2s.checkpoint.weights.released import Released
from w2s.config.sections import ModelConfig

SMALLEST_VISION_TOWER = {"image_size": 1, "patch_size": 1, "width": 1, "head_width": 1, "layers": 1}
"""open_clip builds a text tower in a whole CLIP; this is the rest of it."""


def text_tower(model: ModelConfig) -> TextTransformer:
    """open_clip's module for the text tower of a CLIP, without values.

    Its blocks are the `custom` ones: the same weights and function without the transposed rows of torch's attention, at
    whose graph ONNX Runtime 1.32 crashes in float16 on a CPU.
    """
    quick, text = model.text.activation == "quick_gelu", text_config(model.text) | {"block_type": "custom"}
    with torch.device("meta"):
        return open_clip.CustomTextCLIP(model.embed_dim, SMALLEST_VISION_TOWER, text, quick).text


def loaded_text_tower(released: Released, model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """Return the text tower of a checkpoint in evaluation mode, its weights in `dtype`."""
    tower = text_tower(model)
    names = [name for name in released.meta if name.startswith("text.")]
    tower.load_state_dict({name.removeprefix("text."): released.read(name).to(dtype) for name in names}, assign=True)
    tower.attn_mask = torch.full(tower.attn_mask.shape, -torch.inf, dtype=dtype).triu_(1)
    return tower.eval().requires_grad_(False)
