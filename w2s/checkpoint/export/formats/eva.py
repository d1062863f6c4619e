"""A file for the released EVA-CLIP code: the released names, and its model configuration."""

from pathlib import Path
from typing import Any

from w2s.checkpoint.export.formats.base import EMBEDS_BOTH, EMBEDS_IMAGES, Export, Guide, Snippet, mlp_ratio, write_json
from w2s.checkpoint.export.formats.open_clip import text_config
from w2s.checkpoint.export.weight_files import write_pt
from w2s.checkpoint.weights.views import renamed
from w2s.config.sections import ModelConfig
from w2s.errors import CheckpointError

LOAD = """\
import eva_clip  # baaivision/EVA, EVA-CLIP-18B/shinji
eva_clip.add_model_config("FOLDER/{name}.json")
model, _, preprocess = eva_clip.create_model_and_transforms("{name}", "FOLDER/{name}.pt", force_custom_clip=True)"""


def write(export: Export, folder: Path) -> Guide:
    """Write NAME.pt and NAME.json.

    Raises:
        CheckpointError: it has the bias of the sigmoid loss, or a vision tower of another kind.
    """
    released, model = export.released, export.model
    if model.vision.kind != "eva":
        raise CheckpointError(
            f"{released.path} has a vision tower of model.vision.kind={model.vision.kind}, which EVA-CLIP's code does "
            "not have: use --format open_clip"
        )
    if "logit_bias" in released.meta:
        raise CheckpointError(
            f"{released.path} was trained with the sigmoid loss, whose bias EVA-CLIP's code does not have: "
            "use --format open_clip"
        )
    written = {name: renamed(name) for name in released.meta if not name.startswith("visual.layer_heads.")}
    write_pt(folder / f"{model.name}.pt", released.made_into(written))
    write_json(folder / f"{model.name}.json", eva_config(model))
    task = EMBEDS_BOTH if released.has("text") else EMBEDS_IMAGES
    return Guide("w2s", task, [Snippet("EVA-CLIP's code", LOAD.format(name=model.name))])


def eva_config(model: ModelConfig) -> dict[str, Any]:
    """Return the model_configs/NAME.json with which the released EVA-CLIP code builds a CLIP."""
    vision = model.vision
    return {
        "embed_dim": model.embed_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": mlp_ratio(vision.mlp_width, vision.width),
            "patch_size": vision.patch_size,
            "eva_model_name": model.name,
            "drop_path_rate": 0,
            "qkv_bias": vision.qkv_bias,
            "postnorm": vision.norm_placement == "post",
            "use_rms_norm": vision.norm == "rmsnorm",
        },
        "text_cfg": text_config(model.text),
        **({"quick_gelu": True} if model.text.activation == "quick_gelu" else {}),
    }
