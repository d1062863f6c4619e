"""The contrastive stage: the image and the caption of a pair move together, all others of the global batch apart."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.checkpoint.handover import Handover, take_over_vision
from w2s.config.sections import Config
from w2s.data.batch import Batch, given, normalize
from w2s.data.sample import SampleSpec
from w2s.megatron.groups import Ranks
from w2s.megatron.optimizer import Optimizer, data_parallel
from w2s.megatron.schedule import Loss, Reported, finish_gradients, forward_backward, forward_only
from w2s.megatron.state import Towers
from w2s.megatron.tower import Tower
from w2s.objectives.contrastive import contrastive_loss
from w2s.precision import compute_dtype
from w2s.probe import ClipProbe
from w2s.towers.build import build_clip
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.vision import MEAN, STD
from w2s.tracking.tracker import Tracker
from w2s.trainer import train_stage


def run(config: Config) -> None:
    """Train the contrastive stage."""
    train_stage(config, ContrastiveStage)


def embed_images(tower: ImageTower, batch: Batch) -> Tensor:
    """Unit vectors of a batch's images, [n, embed_dim] in float32, seen through patch dropout."""
    return F.normalize(tower(normalize(batch.images, MEAN, STD), batch.kept).float(), dim=-1)


def embed_texts(tower: TextTower, batch: Batch) -> Tensor:
    """Unit vectors of a batch's captions, [n, embed_dim] in float32."""
    return F.normalize(tower(given(batch.tokens)).float(), dim=-1)


class ContrastiveStage:
    """Builds the two towers; `step` is the stage."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        dtype = compute_dtype(config.precision)
        vision, text = build_clip(config, dtype)
        text.logit_scale.requires_grad_(config.clip.learn_logit_scale)
        self.vision, self.text = data_parallel(vision.to(ranks.device)), data_parallel(text.to(ranks.device))
        self.towers: Towers = {"vision": self.vision, "text": self.text}
        self.optimizer = Optimizer({"vision": self.vision, "text": self.text}, config.optim, dtype)
        self.probe = ClipProbe(config, ranks)
        patches, dropout = config.model.vision.patches, config.clip.patch_dropout
        self.spec = SampleSpec.of(
            config,
            kept_patches=max(1, int(patches * (1 - dropout))) if dropout else 0,
            context_length=config.model.text.context_length,
        )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step: the loss over the global batch, whose features come from one forward pass or from two."""
        micro_batches = [micro.to(self.ranks.device) for micro in batch.split(self.config.train.micro_batch)]
        labels = given(batch.captions).to(self.ranks.device) if self.config.clip.equal_captions == "positives" else None
        if len(micro_batches) == 1 and self.config.clip.two_pass == "auto":
            loss = self._one_pass(micro_batches[0], labels)
        else:
            loss = self._two_passes(micro_batches, labels)
        return {"loss": loss, "logit_scale": self.text.module.logit_scale.exp()}

    def _loss(self, images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor | None) -> Tensor:
        group, tile = self.ranks.data_group, self.config.clip.tile
        return contrastive_loss(images, texts, scale, group=group, labels=labels, tile=tile)

    def _one_pass(self, batch: Batch, labels: Tensor | None) -> Tensor:
        """Forward and backward of both towers at once: the batch of this rank is one micro-batch."""

        def forward(vision: ImageTower, batch: Batch) -> tuple[Tensor, Loss]:
            images, texts = embed_images(vision, batch), embed_texts(self.text, batch)

            def loss(images: Tensor) -> tuple[Tensor, Reported]:
                value = self._loss(images, texts, self.text.module.logit_scale.exp(), labels)
                return value, {"loss": value.detach()}

            return images, loss

        (report,) = forward_backward(self.vision, [batch], forward)
        finish_gradients(self.text)
        return report["loss"]

    def _two_passes(self, micro_batches: list[Batch], labels: Tensor | None) -> Tensor:
        """All features first, then the loss and its gradient by them, then each tower again with that gradient."""
        images = torch.cat(forward_only(self.vision, micro_batches, embed_images)).requires_grad_()
        texts = torch.cat(forward_only(self.text, micro_batches, embed_texts)).requires_grad_()
        scale = self.text.module.logit_scale.exp().detach().requires_grad_()
        loss = self._loss(images, texts, scale, labels)
        loss.backward()
        self._send_back(self.vision, micro_batches, embed_images, given(images.grad), None)
        self._send_back(self.text, micro_batches, embed_texts, given(texts.grad), scale.grad)
        return loss.detach()

    def _send_back(
        self,
        tower: nn.Module,
        micro_batches: list[Batch],
        embed: Callable[[Any, Batch], Tensor],
        gradient: Tensor,
        by_scale: Tensor | None,
    ) -> None:
        """Accumulate in `tower` the gradient that its features and, for the text tower, the logit scale have."""
        count = len(micro_batches)

        def forward(tower: Tower, micro: tuple[Batch, Tensor]) -> tuple[Tensor, Loss]:
            def loss(features: Tensor) -> tuple[Tensor, Reported]:
                value = count * (features * micro[1]).sum()  # the schedule divides by the number of micro-batches
                if by_scale is not None:
                    value = value + by_scale * self.text.module.logit_scale.exp()
                return value, {}

            return embed(tower, micro[0]), loss

        gradients = gradient.split(self.config.train.micro_batch)
        forward_backward(tower, list(zip(micro_batches, gradients, strict=True)), forward)

    def begin(self) -> Handover | None:
        """Take over the vision tower that `init.vision` names."""
        return take_over_vision(self.vision.module, self.config)

    @torch.no_grad()
    def after_update(self) -> None:
        """Keep the logit scale between 1 and its maximum (baaivision/EVA, shinji/training/train.py)."""
        self.text.module.logit_scale.clamp_(0, math.log(self.config.clip.logit_scale_max))

    def extra_state(self) -> dict[str, Tensor]:
        """Nothing beside weights and optimizer."""
        return {}

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Nothing to take back."""

    def evaluate(self) -> dict[str, float]:
        """Zero-shot classification and retrieval on the test images."""
        return self.probe.measure(self.vision.module, self.text.module).metrics if self.config.eval.shards else {}

    def finish(self, tracker: Tracker) -> dict[str, float]:
        """Measure the finished CLIP."""
        metrics = self.evaluate()
        if metrics:
            tracker.results(metrics, "CLIP")
        return metrics
