"""All tensors of a checkpoint under the released names, those of the masked stage too."""

from pathlib import Path

from w2s.checkpoint.export.formats.base import EMBEDS_BOTH, EMBEDS_IMAGES, Export, Guide, Snippet, write_weights
from w2s.checkpoint.weights.views import renamed

LOAD = """\
from safetensors.torch import load_file
tensors = load_file("FOLDER/model.safetensors")  # the names of the released EVA-CLIP checkpoints"""


def write(export: Export, folder: Path) -> Guide:
    """Write model.safetensors."""
    write_weights(folder / "model.safetensors", export, {name: renamed(name) for name in export.released.meta})
    task = EMBEDS_BOTH if export.released.has("text") else EMBEDS_IMAGES
    return Guide("w2s", task, [Snippet("safetensors", LOAD)])
