"""A checkpoint under the released EVA-CLIP names, whoever wrote it.

| written by                                | names there                                             |
|-------------------------------------------|---------------------------------------------------------|
| EVA-CLIP (`CustomCLIP`)                   | `visual.…`, `text.…`, `logit_scale`: the released names |
| EVA's masked stage, timm                  | the vision tower's, without a prefix                    |
| open_clip, with a vision tower of timm's  | `visual.trunk.…`, and text with or without `text.`      |
| open_clip and OpenAI, with their own ViT  | `visual.conv1.…`, which is renamed as timm names it     |
| EVA-CLIP's own folders of transformers    | `vision_model.…`, `text_model.…`: see `evaclip_folder`  |
| transformers, a CLIP or a SigLIP          | `vision_model.…`, `text_model.…`                        |
| w2s                                       | `vision.…`, `text.…` with Megatron's names              |
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.weights import clip_vit
from w2s.checkpoint.weights.eva_format import is_fused, released_name, separate
from w2s.checkpoint.weights.evaclip_folder import evaclip_tensors, is_evaclip
from w2s.checkpoint.weights.tensor_files import Tensors, open_weights
from w2s.checkpoint.weights.transformers_clip import TransformersClip, is_transformers_clip
from w2s.checkpoint.weights.transformers_siglip import TransformersSiglip, is_transformers_siglip
from w2s.config.load import model_from
from w2s.config.sections import Weights
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint.tensor_store import TensorStore

WRAPPING = ("module.", "_orig_mod.", "model.", "timm_model.")
"""Prefixes that data parallelism, `torch.compile` and transformers put before every name."""
BUFFERS = re.compile(
    r"(^|\.)(attn_mask|input_resolution|context_length|vocab_size|position_ids|rope\.freqs_(cos|sin)|k_bias)$"
)
"""What is not a weight: it follows from the shape of the model."""
PLAIN_TEXT = ("token_embedding.", "positional_embedding", "transformer.resblocks.", "ln_final.", "text_projection")
"""Where the text tower of a CLIP without the prefix `text.` begins."""

POOL = "visual.attn_pool.latent"
"""What a SigLIP's vision tower has under its released names, and no other of w2s's kinds."""
TRANSFORMERS = ("vision_model.", "text_model.", "embeddings.patch_embeddings.")
"""How names begin in the CLIPs, SigLIPs and DINOv2s of transformers."""


class Released:
    """Tensors under released names.

    Attributes:
        format: who wrote them: `eva`, `mim`, `open_clip`, `timm`, `text`, `hf` or `w2s`.
        path: where they come from, for messages.
        heads: attention heads by released prefix, `visual` and `text`, as far as the checkpoint says.
    """

    def __init__(
        self,
        tensors: Tensors,
        origins: Mapping[str, str],
        format: str,
        path: Path,
        change: Callable[[str, Tensor], Tensor],
        heads: Mapping[str, int] | None = None,
    ) -> None:
        """Rename `tensors`.

        Args:
            tensors: the checkpoint.
            origins: its names by released name.
            format: who wrote it.
            path: where it comes from.
            change: makes the released layout out of a tensor, which may be on the meta device, and its name there.
            heads: attention heads by released prefix, where they are known.
        """
        self._tensors, self._origins, self._change = tensors, origins, change
        self.format, self.path, self.heads = format, path, dict(heads or {})
        self.meta = {name: change(origin, tensors.meta[origin]) for name, origin in origins.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor in the released layout."""
        origin = self._origins[name]
        return self._change(origin, self._tensors.read(origin))

    def origin(self, name: str) -> str:
        """Return the name that a tensor has in the checkpoint itself."""
        return self._origins[name]

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of our name `name`."""
        return released_name(name) in self.meta

    @property
    def embeds_images(self) -> bool:
        """Whether its vision tower has a head: the projection of the class token, or SigLIP's pool."""
        return "visual.head.weight" in self.meta or POOL in self.meta

    @property
    def has_foreign_text(self) -> bool:
        """Whether its text tower is a SigLIP's: it has a bias in its projection, and its tokens see all others."""
        return self.has("text") and POOL in self.meta and "text.text_projection" not in self.meta

    @property
    def is_masked(self) -> bool:
        """Whether a masked stage wrote it: it still has the head that predicts the teacher's features."""
        return "visual.lm_head.weight" in self.meta

    def has(self, tower: str) -> bool:
        """Whether there are tensors of a tower (`visual` or `text`)."""
        return any(name.startswith(f"{tower}.") for name in self.meta)


def open_released(path: Path, weights: Weights = "last") -> Released:
    """Return a checkpoint of w2s (a folder with meta.json), or other people's weights, under released names.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it holds no moving average to take.
    """
    if (path / "meta.json").is_file():
        return _of_run(path, weights)
    if weights == "ema":
        raise CheckpointError(
            f"{path} is not a checkpoint of w2s, and holds no moving average: take its `last` weights"
        )
    return rename(open_weights(path), path)


def rename(tensors: Tensors, path: Path) -> Released:
    """Return other people's tensors under released names."""
    if is_evaclip(tensors.meta):
        tensors = evaclip_tensors(tensors)
    bare = _unwrapped(tensors.meta)
    format = _format_of(bare)
    if is_transformers_clip(bare) or is_transformers_siglip(bare):
        tensors = (TransformersClip if is_transformers_clip(bare) else TransformersSiglip)(tensors, bare)
        bare = {name: name for name in tensors.meta}
    names = {origin: _released(name) for name, origin in bare.items() if not BUFFERS.search(name)}
    if clip_vit.MARK not in bare:
        return Released(tensors, _swapped(names), format, path, lambda _, tensor: tensor)
    names = {origin: clip_vit.released_from(name) for origin, name in names.items()}

    def shaped(origin: str, tensor: Tensor) -> Tensor:
        return clip_vit.to_released(names[origin], tensor)

    return Released(tensors, _swapped(names), format, path, shaped)


def _swapped(names: Mapping[str, str]) -> dict[str, str]:
    return {name: origin for origin, name in names.items()}


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names by what is left of them without the prefixes that all have."""
    bare = {name: name for name in names}
    prefix = next((start for start in WRAPPING if bare and all(name.startswith(start) for name in bare)), "")
    rest = _unwrapped(name.removeprefix(prefix) for name in bare) if prefix else bare
    return {name: f"{prefix}{origin}" for name, origin in rest.items()}


def _of_run(checkpoint: Path, weights: Weights) -> Released:
    model = model_from(read_meta(checkpoint).config)
    heads = {"vision": model.vision.heads, "text": model.text.heads}

    def separated(name: str, tensor: Tensor) -> Tensor:
        return separate(tensor, heads[name.partition(".")[0]]) if is_fused(name) else tensor

    stored = TensorStore(checkpoint, weights)
    names = [name for name in stored.meta if name.startswith(("vision.", "text."))]
    if not names:
        raise CheckpointError(f"{checkpoint} holds no tower: use another checkpoint")
    prefixed = {"visual": model.vision.heads, "text": model.text.heads}
    return Released(stored, {released_name(name): name for name in names}, "w2s", checkpoint, separated, prefixed)


def _released(name: str) -> str:
    name = name.replace("visual.trunk.", "visual.").replace("visual.head.proj.", "visual.head.")
    if name.startswith(("visual.", "text.")) or name in ("logit_scale", "logit_bias"):
        return name
    return f"text.{name}" if name.startswith((*PLAIN_TEXT, "text_model.")) else f"visual.{name}"


def _format_of(names: dict[str, str]) -> str:
    prefixed = any(name.startswith(("visual.", "text.")) for name in names)
    if any(name.startswith(TRANSFORMERS) for name in names):
        return "hf"
    if "mask_token" in names or "lm_head.weight" in names:
        return "mim"
    if any(name.startswith("visual.trunk.") for name in names) or clip_vit.MARK in names:
        return "open_clip"
    if any(name.startswith(PLAIN_TEXT) for name in names):
        return "open_clip" if prefixed else "text"
    return "eva" if prefixed else "timm"
