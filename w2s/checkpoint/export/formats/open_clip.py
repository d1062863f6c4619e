"""A CLIP for `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

A vision tower of OpenAI's kind is open_clip's own. One of EVA's or SigLIP's kind is timm's: open_clip's configuration
can name it by a name that timm knows, by a path, or by a hub. Where timm knows no name, config.json beside it describes
the tower, and the configuration names the folder that it stands in: that of the hub, or the one where the program runs.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from w2s.checkpoint.export.formats.base import (
    EMBEDS_BOTH,
    RESIZED,
    Export,
    Guide,
    Snippet,
    mlp_ratio,
    write_json,
    write_weights,
)
from w2s.checkpoint.export.formats.timm import named_tower, timm_config
from w2s.checkpoint.weights.eva_format import HEAD, translate
from w2s.checkpoint.weights.layouts import OPEN_CLIP_VISION, contract, inverse
from w2s.checkpoint.weights.matching import MASKED_STAGE
from w2s.checkpoint.weights.views import Source, renamed
from w2s.config.sections import ModelConfig, TextConfig, VisionConfig
from w2s.errors import CheckpointError
from w2s.towers.vision import channel_statistics

HERE = "local-dir:."

LOAD = """\
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("{place}")
tokenizer = open_clip.get_tokenizer("{place}")
images, texts = model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer(["a cat"]))"""
ANYWHERE = """\
import json, open_clip
vision = json.load(open("FOLDER/open_clip_config.json"))["model_cfg"]["vision_cfg"]
vision["timm_model_name"] = "local-dir:FOLDER"
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER", vision_cfg=vision)"""
COMMANDS = """\
{cd}clip_benchmark eval --model {place} --pretrained "" --dataset wds/SET --dataset_root DATA
{cd}python -m open_clip_train.main --model {place} --train-data DATA --logs LOGS"""


def write(export: Export, folder: Path) -> Guide:
    """Write open_clip_config.json and open_clip_model.safetensors, and timm's config.json where it is needed.

    Raises:
        CheckpointError: it is not a whole CLIP, timm has no tower of its kind, or open_clip's own vision tower has
            another activation than the text tower.
    """
    released, model = export.released, export.model
    if not (released.has("text") and released.embeds_images):
        raise CheckpointError(
            f"{released.path} is not a whole CLIP, which is all that open_clip has: "
            "export a clip run, or use --format timm"
        )
    plain = model.vision.kind == "clip"
    if plain and model.vision.activation != model.text.activation:
        raise CheckpointError(
            f"{released.path} has {model.vision.activation} in its vision tower and {model.text.activation} in its "
            "text tower, and open_clip one for both: use --format transformers"
        )
    named = "" if plain else named_tower(model.vision)
    tower = named if named is not None else f"hf-hub:{export.hub}" if export.hub else HERE
    config = open_clip_config(model, tower, logit_bias="logit_bias" in released.meta)
    write_json(folder / "open_clip_config.json", config)
    if named is None:
        write_json(folder / "config.json", timm_config(model.vision, features=0))
    names = [name for name in released.meta if not name.startswith(MASKED_STAGE)]
    if plain:
        sources = {plain_name(name): Source((name,), partial(_plain, name)) for name in names}
    else:
        sources = {open_clip_name(name): renamed(name) for name in names}
    write_weights(folder / "open_clip_model.safetensors", export, sources)
    return Guide("open_clip", EMBEDS_BOTH, _snippets(named is not None, export.hub), [RESIZED])


def _snippets(named: bool, hub: str) -> list[Snippet]:
    """How to load it from anywhere, in the folder, and from the hub."""
    snippets = [] if named else [Snippet("open_clip, from anywhere", ANYWHERE)]
    if named:
        snippets += _by_name("from anywhere", "local-dir:FOLDER")
    elif not hub:
        snippets += _by_name("in the folder", HERE, cd="cd FOLDER && ")
    return snippets + (_by_name("from the hub", f"hf-hub:{hub}") if hub else [])


def _by_name(where: str, place: str, cd: str = "") -> list[Snippet]:
    return [
        Snippet(f"open_clip, {where}", LOAD.format(place=place)),
        Snippet(f"CLIP_benchmark and open_clip_train, {where}", COMMANDS.format(cd=cd, place=place), "bash"),
    ]


def open_clip_name(name: str) -> str:
    """Return open_clip's name of a released tensor: the vision tower is timm's, the projection open_clip's own."""
    if name.startswith("visual.head."):
        return name.replace("visual.head.", "visual.head.proj.", 1)
    return name.replace("visual.", "visual.trunk.", 1) if name.startswith("visual.") else name


def plain_name(name: str) -> str:
    """Return the name that a released tensor has in a CLIP with open_clip's own vision tower."""
    if not name.startswith("visual."):
        return name
    return "visual.proj" if name == HEAD else translate(name, inverse(OPEN_CLIP_VISION))


def _plain(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name == HEAD else contract(name, tensor)


def open_clip_config(model: ModelConfig, tower: str, logit_bias: bool) -> dict[str, Any]:
    """Return the open_clip_config.json of a CLIP.

    Args:
        model: the CLIP.
        tower: timm's name of a vision tower of EVA's or SigLIP's kind, or of the place whose config.json describes it.
        logit_bias: whether the loss has a bias beside its scale (SigLIP).
    """
    mean, std = channel_statistics(model.vision)
    return {
        "model_cfg": {
            "embed_dim": model.embed_dim,
            "custom_text": True,
            "vision_cfg": _vision_config(model.vision, tower),
            "text_cfg": text_config(model.text),
            **({"quick_gelu": True} if model.text.activation == "quick_gelu" else {}),
            **({"init_logit_bias": -10} if logit_bias else {}),
        },
        "preprocess_cfg": {
            "size": model.vision.image_size,
            "mode": "RGB",
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _vision_config(vision: VisionConfig, tower: str) -> dict[str, Any]:
    if vision.kind == "clip":
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layers": vision.layers,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": mlp_ratio(vision.mlp_width, vision.width),
        }
    return {
        "image_size": vision.image_size,
        "timm_model_name": tower,
        "timm_model_pretrained": False,
        **(
            {"timm_pool": "map", "timm_proj": "none"}
            if vision.kind == "siglip"
            else {"timm_pool": "token", "timm_proj": "linear", "timm_proj_bias": vision.head_bias}
        ),
    }


def text_config(text: TextConfig) -> dict[str, Any]:
    """Return a text tower in the words of open_clip's and EVA-CLIP's configurations."""
    config: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
    }
    if text.mlp_width != 4 * text.width:
        config["mlp_ratio"] = mlp_ratio(text.mlp_width, text.width)
    return config
