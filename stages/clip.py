"""The contrastive stage: the image and the caption of a pair move together, all others of the global batch apart.

The loss needs the features of the whole global batch at once. Where micro-batches or a pipeline give them a part at a
time, the step is GradCache's (Gao et al. 2021, arXiv 2101.06983). docs/pipeline.md goes through it rank by rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.checkpoint.starts.handover import Handover, take_over
from w2s.config.batching import num_kept_patches, num_passes
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch, gather_batch, normalize, require
from w2s.data.samples.sample import SampleSpec
from w2s.evaluation.clip_evaluator import ClipEvaluator
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.pipeline_schedule import (
    Loss,
    Metrics,
    forward_backward,
    forward_only,
    reduce_gradients,
    start_pass,
)
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import data_parallel
from w2s.objectives.contrastive import contrastive_loss
from w2s.objectives.sigmoid import sigmoid_loss
from w2s.teachers.distillation.contrastive import ContrastiveDistillation
from w2s.towers.build import build_clip
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.vision import channel_statistics
from w2s.tracking.tracker import Tracker
from w2s.training.train_stage import train_stage


def run(config: Config) -> None:
    """Train the contrastive stage."""
    train_stage(config, ContrastiveStage)


def sample_spec(config: Config, teacher_sizes: tuple[int, ...] = ()) -> SampleSpec:
    """What the stage needs of a sample, with teachers whose inputs have `teacher_sizes` pixels a side."""
    patches, dropout = config.model.vision.patches, config.clip.patch_dropout
    return SampleSpec.of(
        config,
        teacher_sizes=teacher_sizes,
        teacher_samples=config.clip.distill.last_step(config.train) * config.train.global_batch,
        num_kept_patches=num_kept_patches(patches, dropout) if dropout else 0,
        context_length=config.model.text.context_length,
    )


def encode_image(tower: ImageTower, batch: Batch) -> Tensor:
    """Features of a batch's images or clips, seen through patch dropout and drop path: [n, embed_dim]."""
    return tower(normalize(batch.images, *channel_statistics(tower.shape)), batch.kept, batch.branch_scales)


def encode_text(tower: TextTower, batch: Batch) -> Tensor:
    """Features of a batch's captions: [n, embed_dim]."""
    return tower(require(batch.tokens))


class ContrastiveStage:
    """Builds the two towers; `step` is the stage."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        dtype = compute_dtype(config.precision)
        self.vision, self.text = (
            data_parallel(tower, config.parallel, config.precision) for tower in build_clip(config, dtype, ranks.device)
        )
        self.towers: Towers = {"vision": self.vision, "text": self.text}
        # As baaivision/EVA, shinji/training/train.py.
        bounds = {"logit_scale": (0.0, math.log(config.clip.logit_scale_max))}
        self.optimizer = Optimizer(self.towers, config.optim, dtype, config.init.scratch, bounds)
        self.evaluator = ClipEvaluator(config, ranks)
        self.distillation = next((ContrastiveDistillation(config, each, ranks) for each in config.stage_teachers), None)
        self.teachers: Sequence[nn.Module] = [self.distillation.teacher] if self.distillation else []
        self.spec = sample_spec(config, self.distillation.image_sizes if self.distillation else ())

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step: the loss over the global batch, whose features come from one forward pass or from two.

        Args:
            batch: this rank's share of the samples of its model-parallel group. A teacher sees no others here.
        """
        micro_batch = self.config.train.micro_batch
        local_batch = batch if self.distillation is None else self.distillation.run_teacher(batch, micro_batch)
        group_batch = gather_batch(local_batch.to(self.ranks.device), self.ranks.model_group)
        micro_batches = group_batch.split(micro_batch)
        if num_passes(self.config, len(micro_batches)) == 1:
            return self._direct_step(group_batch)
        return self._gradcache_step(group_batch, micro_batches)

    def _loss(
        self, images: Tensor, texts: Tensor, logit_parameters: Sequence[Tensor], batch: Batch
    ) -> tuple[Tensor, Metrics]:
        """The loss of the features of a whole batch, over the data-parallel ranks: contrastive, and distillation's."""
        clip, (logit_scale, *bias) = self.config.clip, logit_parameters
        units = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        labels = require(batch.caption_hashes) if clip.equal_captions == "positives" else None
        loss = sigmoid_loss if clip.loss == "sigmoid" else contrastive_loss
        scale = logit_scale.exp()
        value = loss(*units, scale, *bias, group=self.ranks.data_group, labels=labels, tile=clip.tile)
        reported = {"loss": value.detach(), "logit_scale": scale.detach()}
        if self.distillation is not None and self.distillation.on:
            distance = self.distillation.loss(*units, scale, batch, self.ranks.data_group)
            value = value + self.distillation.weight * distance
            reported["distill_loss"] = distance.detach()
        return value, reported

    def _direct_step(self, batch: Batch) -> Metrics:
        """Forward and backward of both towers at once: the batch of this rank is one micro-batch."""
        (text,) = self.text.chunks

        def forward(vision: ImageTower, batch: Batch) -> tuple[Tensor, Loss]:
            images, texts = encode_image(vision, batch), encode_text(text, batch)

            def loss(images: Tensor) -> tuple[Tensor, Metrics]:
                return self._loss(images, texts, text.logit_parameters(), batch)

            return images, loss

        start_pass(self.text)
        (losses,) = forward_backward(self.vision, [batch], forward, self._num_tokens("vision", batch))
        reduce_gradients(self.text)
        return losses

    def _gradcache_step(self, batch: Batch, micro_batches: list[Batch]) -> Metrics:
        """GradCache: all features, the loss and its gradients with respect to them, the towers again with those."""
        images = forward_only(self.vision, micro_batches, encode_image, self._num_tokens("vision", micro_batches[0]))
        texts = forward_only(self.text, micro_batches, encode_text, self._num_tokens("text", micro_batches[0]))
        losses, (grad_images, grad_texts, *grad_logit_parameters) = self._feature_gradients(images, texts, batch)
        self._backward("vision", micro_batches, encode_image, grad_images, [])
        self._backward("text", micro_batches, encode_text, grad_texts, grad_logit_parameters)
        return losses

    def _feature_gradients(
        self, images: list[Tensor], texts: list[Tensor], batch: Batch
    ) -> tuple[Metrics, Sequence[Tensor | None]]:
        """The losses, and the gradients with respect to features and logit parameters; None without features."""
        if self.text.last_chunk is None:
            return {}, (None, None)
        logit_parameters = [each.detach().clone() for each in self.text.last_chunk.logit_parameters()]
        leaves = [leaf.requires_grad_() for leaf in (torch.cat(images), torch.cat(texts), *logit_parameters)]
        loss, losses = self._loss(leaves[0], leaves[1], leaves[2:], batch)
        return losses, torch.autograd.grad(loss, leaves)

    def _backward(
        self,
        name: str,
        micro_batches: list[Batch],
        embed: Callable[[Any, Batch], Tensor],
        grad_features: Tensor | None,
        grad_logit_parameters: Sequence[Tensor | None],
    ) -> None:
        """Hand a tower the gradients with respect to its features and, for text, the logit parameters."""
        count = len(micro_batches)

        def forward(chunk: Any, micro: tuple[Batch, Tensor]) -> tuple[Tensor, Loss]:
            def loss(features: Tensor) -> tuple[Tensor, Metrics]:
                # The schedule divides by the number of micro-batches.
                value = count * (features.float() * micro[1].float()).sum()
                parameters = chunk.logit_parameters() if grad_logit_parameters else []
                for gradient, parameter in zip(grad_logit_parameters, parameters, strict=True):
                    value = value + gradient * parameter
                return value, {}

            return embed(chunk, micro[0]), loss

        # Only the last pipeline stage has features, and so gradients with respect to them.
        parts = [None] * count if grad_features is None else grad_features.split(self.config.train.micro_batch)
        micros = list(zip(micro_batches, parts, strict=True))
        forward_backward(self.towers[name], micros, forward, self._num_tokens(name, micro_batches[0]))

    def _num_tokens(self, name: str, batch: Batch) -> int:
        """Tokens of all samples of a batch in a tower; each phase of the data has its own patch dropout and frames."""
        model = self.config.model
        if name == "text":
            return len(batch) * model.text.context_length
        patches = model.vision.patches if batch.kept is None else batch.kept.shape[-1]
        return len(batch) * batch.frames * (model.vision.class_tokens + patches)

    def begin(self) -> Handover | None:
        """Take over the towers that `init.vision` and `init.text` name; a scale that is set is kept."""
        text = None
        if self.config.init.text == "teacher":
            from w2s.teachers.text import text_weights  # with open_clip, which others do without

            text = text_weights(self.config)
        handover = take_over(self.towers, self.config, text)
        if self.text.last_chunk is not None and self.config.clip.logit_scale is not None:
            self.text.last_chunk.logit_scale.data.fill_(math.log(self.config.clip.logit_scale))
        return handover

    def extra_state(self) -> dict[str, Tensor]:
        """Whether the student has overtaken the teacher, if there is one."""
        return {} if self.distillation is None else self.distillation.state()

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Restore whether the student had overtaken the teacher."""
        if self.distillation is not None:
            self.distillation.load_state(extra)

    def evaluate(self) -> dict[str, float]:
        """Zero-shot classification and retrieval on the test images; a teacher that is overtaken there is dropped."""
        if not self.config.eval.shards:
            return {}
        metrics = self.evaluator.measure(self.vision, self.text).metrics
        return (
            metrics
            if self.distillation is None
            else metrics | self.distillation.judge(metrics, self.evaluator.measure_teacher)
        )

    def finish(self, tracker: Tracker) -> dict[str, float]:
        """Measure the finished CLIP."""
        metrics = self.evaluate()
        if metrics:
            tracker.results(metrics, "CLIP")
        return metrics
