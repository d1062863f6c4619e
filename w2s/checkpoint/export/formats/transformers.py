"""A CLIP for transformers' `AutoModel.from_pretrained("FOLDER")`, in stock classes.

A tower of EVA's kind is timm's in transformers' own wrapper, beside CLIP's text model in a
`VisionTextDualEncoderModel`; a CLIP's own vision transformer gives a `CLIPModel`. Neither has a bias after the vision
projection: one goes into the final norm's, so that the projection gives it back.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2s.checkpoint.export.formats.base import EMBEDS_BOTH, Export, Guide, Snippet, write_json
from w2s.checkpoint.export.formats.processor import LIMITS, write_processor
from w2s.checkpoint.export.formats.timm import timm_config, timm_name
from w2s.checkpoint.export.weight_files import write_safetensors
from w2s.checkpoint.weights.eva_format import HEAD, HEAD_BIAS, translate
from w2s.checkpoint.weights.layouts import TRANSFORMERS_TEXT, TRANSFORMERS_VISION, contract, inverse
from w2s.checkpoint.weights.matching import MASKED_STAGE
from w2s.checkpoint.weights.released import Released
from w2s.checkpoint.weights.views import Source, View, renamed
from w2s.config.sections import ModelConfig, TextConfig, VisionConfig
from w2s.errors import CheckpointError
from w2s.towers.clip import TEXT_NORM_EPS

FINAL_NORM = "visual.norm.bias"
LOAD = """\
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained("{place}"), AutoProcessor.from_pretrained("{place}"){needs}
inputs = processor(text=["a cat", "a dog"], images=image, return_tensors="pt", padding=True, truncation=True)
probabilities = model(**inputs).logits_per_image.softmax(-1)"""
PIPELINE = """\
from transformers import pipeline
classify = pipeline("zero-shot-image-classification", "{place}")
answers = classify(image, candidate_labels=["cat", "dog"])  # with "This is a photo of", no longer than a caption"""


def write(export: Export, folder: Path) -> Guide:
    """Write `config.json`, `model.safetensors`, and the files of the processor.

    Raises:
        CheckpointError: it is not a whole CLIP, or transformers has no class for it.
    """
    released, model = export.released, export.model
    require_clip(released, "transformers")
    if model.vision.kind == "siglip":
        raise CheckpointError(
            f"{released.path} pools by attention, as SigLIP, and transformers has no class for that beside CLIP's text "
            "tower: use --format open_clip, onnx or torch_export, or --format timm for the vision tower"
        )
    if "logit_bias" in released.meta:
        raise CheckpointError(
            f"{released.path} was trained with the sigmoid loss, whose bias transformers' CLIPs do not have: "
            "use --format open_clip, onnx or torch_export"
        )
    plain = model.vision.kind == "clip"
    tensors = View(released, sources(released, plain))
    dtypes = Counter(tensor.dtype for tensor in tensors.meta.values())
    common = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    config = clip_config(model) if plain else dual_encoder_config(model)
    write_json(folder / "config.json", config | {"dtype": common, "torch_dtype": common})
    write_processor(folder, model, "CLIPProcessor" if plain else "VisionTextDualEncoderProcessor")
    write_safetensors(folder / "model.safetensors", tensors, {"model": model.name})
    needs = "" if plain else "  # transformers 5, and timm"
    snippets = [
        Snippet("transformers", LOAD.format(place="FOLDER", needs=needs)),
        Snippet("transformers' pipeline", PIPELINE.format(place="FOLDER")),
    ]
    if export.hub:
        snippets.append(Snippet("transformers, from the hub", LOAD.format(place=export.hub, needs=needs)))
    return Guide("transformers", EMBEDS_BOTH, snippets, LIMITS)


def require_clip(released: Released, peer: str) -> None:
    """Refuse what is not a whole CLIP.

    Raises:
        CheckpointError: a tower or a projection is missing.
    """
    if not (released.has("text") and released.embeds_images):
        raise CheckpointError(
            f"{released.path} is not a whole CLIP, which is what {peer} gets: export a clip run, or the vision tower "
            "with --format timm, which transformers' AutoModel loads too"
        )


def dual_encoder_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a `VisionTextDualEncoderModel` over timm's tower and CLIP's text model."""
    timm = timm_config(model.vision, 0)
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": model.embed_dim,
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": timm["architecture"],
            "model_args": timm["model_args"],
            "do_pooling": True,
            "hidden_size": model.vision.width,
        },
        "text_config": _text_config(model.text, model.embed_dim),
    }


def clip_config(model: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a `CLIPModel`."""
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "vision_config": _vision_config(model.vision, model.embed_dim),
        "text_config": _text_config(model.text, model.embed_dim),
    }


def _vision_config(vision: VisionConfig, embed_dim: int) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_hidden_layers": vision.layers,
        "hidden_size": vision.width,
        "num_attention_heads": vision.heads,
        "intermediate_size": vision.mlp_width,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
        "projection_dim": embed_dim,
    }


def _text_config(text: TextConfig, embed_dim: int) -> dict[str, Any]:
    """The end token has the highest number, and the start token the one before it."""
    return {
        "model_type": "clip_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "num_hidden_layers": text.layers,
        "hidden_size": text.width,
        "num_attention_heads": text.heads,
        "intermediate_size": text.mlp_width,
        "hidden_act": text.activation,
        "layer_norm_eps": TEXT_NORM_EPS,
        "projection_dim": embed_dim,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": text.vocab_size - 1,
    }


def sources(released: Released, plain: bool) -> dict[str, Source]:
    """Return what each tensor of a `CLIPModel` (`plain`), or of a dual encoder over timm's tower, is made of.

    A dual encoder has the text model as a model of its own.
    """
    made: dict[str, Source] = {}
    vision, text = inverse(TRANSFORMERS_VISION), inverse(TRANSFORMERS_TEXT)
    for name in released.meta:
        if name.startswith("visual.") and not name.startswith((*MASKED_STAGE, "visual.head.")):
            if plain:
                made |= _apart(f"vision_model.{translate(name.removeprefix('visual.'), vision)}", name)
            else:
                made[f"vision_model.timm_model.{timm_name(name)}"] = renamed(name)
    if not plain and released.meta.keys() >= {FINAL_NORM, HEAD_BIAS}:
        final = f"vision_model.timm_model.{timm_name(FINAL_NORM)}"
        made[final] = Source((FINAL_NORM, HEAD, HEAD_BIAS), partial(_with_head_bias, released.path))
    made["logit_scale"] = Source(("logit_scale",), lambda scale: scale.reshape(()))
    made["visual_projection.weight"] = renamed(HEAD)
    made["text_projection.weight"] = Source(("text.text_projection",), lambda weight: weight.T)
    for name in released.meta:
        if name.startswith("text.") and name != "text.text_projection":
            theirs = translate(name.removeprefix("text."), text)
            made |= _apart(f"{'text_model' if plain else 'text_model.text_model'}.{theirs}", name)
    return made


def _apart(theirs: str, name: str) -> dict[str, Source]:
    """A released tensor; Q, K and V are three there."""
    if ".qkv." not in theirs:
        return {theirs: Source((name,), partial(contract, name))}
    return {
        theirs.replace(".qkv.", f".{part}_proj."): Source((name,), partial(_third, index))
        for index, part in enumerate("qkv")
    }


def _third(index: int, weight: Tensor) -> Tensor:
    return weight.chunk(3)[index]


def _with_head_bias(path: Path, norm_bias: Tensor, head: Tensor, head_bias: Tensor) -> Tensor:
    """The final norm's bias b, so that the projection W of it is what W b + c was: b + W^+ c.

    Raises:
        CheckpointError: W cannot give the bias c: it gives more channels than it reads.
    """
    if norm_bias.is_meta:
        return norm_bias
    weight, bias = head.double(), head_bias.double()
    shift = torch.linalg.lstsq(weight, bias[:, None], driver="gelsd").solution[:, 0]
    if not torch.allclose(weight @ shift, bias, rtol=0, atol=1e-7 * float(bias.abs().max() + 1)):
        raise CheckpointError(
            f"{path} has a bias after its vision projection that transformers' CLIPs cannot hold: "
            "use --format open_clip"
        )
    return (norm_bias.double() + shift).to(norm_bias.dtype)
