"""A checkpoint under the released EVA-CLIP names, whoever wrote it: another program (`layouts.py`), or w2s."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from w2s.checkpoint.own.checkpoint_folders import read_meta
from w2s.checkpoint.weights.eva_format import HEAD, POOL, is_fused, released_name, separate
from w2s.checkpoint.weights.layouts import sources_of
from w2s.checkpoint.weights.tensor_files import Tensors, open_weights
from w2s.checkpoint.weights.views import Source, View, renamed
from w2s.config.load import model_from
from w2s.config.sections import Weights
from w2s.errors import CheckpointError
from w2s.megatron.checkpoint.tensor_store import TensorStore


class Released(View):
    """Tensors under released names.

    Args:
        tensors: the checkpoint, or another view of it.
        sources: what each tensor is made of.
        format: who wrote them: `eva`, `mim`, `open_clip`, `timm`, `text`, `hf` or `w2s`.
        path: where they come from, for messages.
        heads: attention heads by released prefix, `visual` and `text`, as far as they are known.
    """

    def __init__(
        self,
        tensors: Tensors,
        sources: Mapping[str, Source],
        format: str,
        path: Path,
        heads: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(tensors, sources)
        self.format, self.path, self.heads = format, path, dict(heads or {})

    def made_into(self, sources: Mapping[str, Source], heads: Mapping[str, int] | None = None) -> "Released":
        """Return others that are made of these tensors; `heads` replaces those of the towers that it names."""
        return Released(self, sources, self.format, self.path, {**self.heads, **(heads or {})})

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of our name `name`."""
        return released_name(name) in self.meta

    @property
    def has_pool(self) -> bool:
        """Whether its vision tower has SigLIP's pool."""
        return f"{POOL}latent" in self.meta

    @property
    def embeds_images(self) -> bool:
        """Whether its vision tower has a head: the projection of the class token, or SigLIP's pool."""
        return HEAD in self.meta or self.has_pool

    @property
    def has_foreign_text(self) -> bool:
        """Whether its text tower is a SigLIP's: it has a bias in its projection, and its tokens see all others."""
        return self.has("text") and self.has_pool and "text.text_projection" not in self.meta

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
    format, sources = sources_of(tensors.meta)
    return Released(tensors, sources, format, path)


def _of_run(checkpoint: Path, weights: Weights) -> Released:
    model = model_from(read_meta(checkpoint).config)
    heads = {"vision": model.vision.heads, "text": model.text.heads}
    stored = TensorStore(checkpoint, weights)
    sources = {}
    for name in stored.meta:
        tower = name.partition(".")[0]
        if tower in heads:
            order = partial(separate, heads=heads[tower])
            sources[released_name(name)] = Source((name,), order) if is_fused(name) else renamed(name)
    if not sources:
        raise CheckpointError(f"{checkpoint} holds no tower: use another checkpoint")
    return Released(stored, sources, "w2s", checkpoint, {"visual": heads["vision"], "text": heads["text"]})
