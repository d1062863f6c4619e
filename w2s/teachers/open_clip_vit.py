"""Vision towers of open_clip as teachers, with weights from a local file or random ones.

A feature is a patch token after the final norm and the projection into the space shared with text, the summary is
`encode_image`. Towers that are no ViT are in `w2s.teachers.open_clip_maps`.
"""

from collections.abc import Sequence
from pathlib import Path

import open_clip
from open_clip.factory import load_state_dict
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from w2s.errors import ConfigError
from w2s.teachers.base import Features, PatchNetwork, check_image_size
from w2s.teachers.open_clip_maps import OpenClipMaps, OpenClipResNet
from w2s.teachers.timm_vit import TimmTokens, resize_input
from w2s.teachers.weights import reading, unknown_model

# A teacher needs no text tower, and a real one costs memory or, for Hugging Face's, a download.
SMALLEST_TEXT_TOWER = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


class OpenClipTokens(PatchNetwork):
    """Patch tokens of open_clip's own ViT: `ln_post(tokens) @ proj`."""

    def __init__(self, visual: VisionTransformer, *, mean: Sequence[float], std: Sequence[float]) -> None:
        """Wrap the vision tower of an open_clip model."""
        size, patches = visual.image_size[0], visual.grid_size[0]
        super().__init__(
            width=visual.output_dim,
            summary_width=visual.output_dim,
            grid=patches,
            image_size=size,
            mean=mean,
            std=std,
            depth=visual.transformer.layers,
            layer_width=visual.transformer.width,
        )
        self.visual = visual

    def forward(self, images: Tensor, layers: Sequence[int] = ()) -> Features:
        """Features of normalised images, row by row, without CLS."""
        last = self.depth - 1
        wanted = sorted({*layers, last})
        outputs = self.visual.forward_intermediates(images, indices=wanted, output_fmt="NLC")
        found = dict(zip(wanted, outputs["image_intermediates"], strict=True))
        patches = self.visual.ln_post(found[last]) @ self.visual.proj
        return Features(patches, outputs["image_features"], tuple(found[layer] for layer in layers))


def open_clip_model(name: str, file: Path | None, *, image_size: int) -> PatchNetwork:
    """The vision tower of the open_clip model `name`, from a file in open_clip's format.

    Args:
        name: the model.
        file: its weights (PyTorch or safetensors); None leaves them random.
        image_size: side of the input in pixels, 0 for the model's own.

    Raises:
        ConfigError: open_clip has no such model, it has no patch tokens, or the image size does not suit it.
        CheckpointError: the file cannot be read or holds another model.
    """
    known = open_clip.list_models()
    if name not in known:
        raise unknown_model("open_clip", name, known)
    model = _build(name, image_size)
    with reading(file, name):
        if file is not None:
            _load_visual(model, file)
    return _wrapped(model, name, image_size)


def _wrapped(model: open_clip.CLIP, name: str, image_size: int) -> PatchNetwork:
    """The vision tower as a teacher's network, by its kind."""
    visual, (mean, std) = model.visual, _normalisation(name)
    if isinstance(visual, ModifiedResNet):
        return OpenClipResNet(visual, image_size=image_size, mean=mean, std=std)
    if not isinstance(visual, TimmModel):
        return OpenClipTokens(visual, mean=mean, std=std)
    if isinstance(visual.trunk, Eva | TimmVisionTransformer):
        resize_input(visual.trunk, image_size)
        projection = nn.Sequential(visual.trunk.head, visual.head)
        # Where attention pools the tokens first, single ones do not go through the projection.
        head = projection if visual.trunk.attn_pool is None else nn.Identity()
        return TimmTokens(visual.trunk, head, projection=projection, mean=mean, std=std)
    width = open_clip.get_model_config(name)["embed_dim"]
    return OpenClipMaps(visual, name, image_size=image_size, width=width, mean=mean, std=std)


def _build(name: str, image_size: int) -> open_clip.CLIP:
    """A CLIP with random weights and the vision tower of `name`; open_clip's own ViT already has its input size."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if vision.get("attentional_pool"):
        raise ConfigError(
            f"teacher.source: {name} has no patch tokens after its final norm, choose one without attentional pooling"
        )
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif image_size and isinstance(vision["layers"], int):
        check_image_size(image_size, vision["patch_size"])
        vision["image_size"] = image_size
    return open_clip.CLIP(config["embed_dim"], vision, SMALLEST_TEXT_TOWER, config.get("quick_gelu", False))


def _load_visual(model: open_clip.CLIP, file: Path) -> None:
    """Load the vision tower's part of a checkpoint, its positions resampled to the model's grid."""
    state = {key: value for key, value in load_state_dict(str(file)).items() if key.startswith("visual.")}
    resize_pos_embed(state, model)
    model.visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})


def _normalisation(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the preprocessing that open_clip states for the first published weights of a model."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    mean = published.get("mean") or open_clip.OPENAI_DATASET_MEAN
    return mean, published.get("std") or open_clip.OPENAI_DATASET_STD
