"""Vision towers of open_clip as teachers, with weights from a local file or random ones.

A feature is a patch token after the final norm and the projection into the space shared with text, the summary is
`encode_image`. Where attention pools the tokens first (CoCa), a feature is what the pool makes of one token alone: its
values and output projection (Zhou et al. 2022, MaskCLIP). Other towers are in `w2s.teachers.networks.open_clip_maps`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from w2s.teachers.networks.open_clip_maps import OpenClipMaps, OpenClipResNet
from w2s.teachers.networks.open_clip_names import Described, described
from w2s.teachers.networks.teacher_weights import indexed, reading
from w2s.teachers.networks.timm_vit import TimmTokens, resize_input

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
        by_layer = dict(zip(wanted, outputs["image_intermediates"], strict=True))
        patches = self.visual.ln_post(self._alone(by_layer[last])) @ self.visual.proj
        return Features(patches, outputs["image_features"], tuple(by_layer[layer] for layer in layers))

    def _alone(self, tokens: Tensor) -> Tensor:
        """What attentional pooling makes of each token alone, whatever the query; the tokens where there is none."""
        pool = self.visual.attn_pool
        if pool is None:
            return tokens
        alone = pool.ln_k(tokens).flatten(0, 1)[:, None]
        query = pool.ln_q(pool.query[:1]).expand(len(alone), 1, -1)
        return pool.attn(query, alone, alone, need_weights=False)[0].view(*tokens.shape[:2], -1)


def open_clip_model(name: str, file: Path | None, *, image_size: int) -> PatchNetwork:
    """The vision tower of the open_clip model `name`, from a file in open_clip's format.

    Args:
        name: the model, or `local-dir:FOLDER` with an open_clip_config.json.
        file: its weights (PyTorch or safetensors); None leaves them random.
        image_size: side of the input in pixels, 0 for the model's own.

    Raises:
        ConfigError: open_clip has no such model, or the image size does not suit it.
        CheckpointError: the file cannot be read or holds another model.
    """
    known = described(name)
    with reading(file, name):
        model = _build(known.config, image_size)
        if file is not None:
            _load_visual(model, file)
    return _wrapped(model.visual, known, name, image_size)


def _wrapped(visual: Any, known: Described, name: str, image_size: int) -> PatchNetwork:
    """The vision tower as a teacher's network, by its kind."""
    config, mean, std = known
    if isinstance(visual, ModifiedResNet):
        return OpenClipResNet(visual, image_size=image_size, mean=mean, std=std)
    if not isinstance(visual, TimmModel):
        if visual.attn_pool is not None and visual.attn_pool_contrastive is not None:
            raise ConfigError(f"teacher.source: {name} pools by attention twice: use a CoCa with attentional_pool=true")
        return OpenClipTokens(visual, mean=mean, std=std)
    if isinstance(visual.trunk, Eva | TimmVisionTransformer):
        resize_input(visual.trunk, image_size)
        projection = nn.Sequential(visual.trunk.head, visual.head)
        # Where attention pools the tokens first, single ones do not go through the projection.
        head = projection if visual.trunk.attn_pool is None else nn.Identity()
        return TimmTokens(visual.trunk, head, projection=projection, mean=mean, std=std)
    return OpenClipMaps(visual, name, image_size=image_size, width=config["embed_dim"], mean=mean, std=std)


def _build(config: dict[str, Any], image_size: int) -> open_clip.CLIP:
    """A CLIP with random weights and a described vision tower; open_clip's own ViT already has its input size."""
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif image_size and isinstance(vision["layers"], int):
        check_image_size(image_size, vision["patch_size"])
        vision["image_size"] = image_size
    return open_clip.CLIP(config["embed_dim"], vision, SMALLEST_TEXT_TOWER, config.get("quick_gelu", False))


def _load_visual(model: open_clip.CLIP, file: Path) -> None:
    """Load the vision tower's part of a checkpoint, its positions resampled to the model's grid."""
    whole = indexed(file) or load_state_dict(str(file))
    # in float32: half precision cannot be resampled on a CPU
    state = {key: value.float() for key, value in whole.items() if key.startswith("visual.")}
    resize_pos_embed(state, model)
    model.visual.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})
