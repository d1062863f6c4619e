"""What is measured of a CLIP: its texts' classification and retrieval of images, and its vision tower beside."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from w2s.config.sections import Resize
from w2s.data.samples.batch import require
from w2s.evaluation.by_gallery import Gallery
from w2s.evaluation.by_texts import ClipResult, evaluate_clip
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.evaluator import Evaluator
from w2s.evaluation.metric_names import of_sets
from w2s.evaluation.tower_features import tower_outputs
from w2s.megatron.parallel.pipeline_schedule import infer
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.teachers.clip_teacher import ClipTeacher
from w2s.towers.clip import ImageTower, TextTower

HEADLINES = ("zero_shot/top1", "zero_shot/mean_average_precision", "retrieval/mean_recall_at_1")
"""The metric that counts of a test set: the first of these that it has."""


def headline(metrics: Mapping[str, float]) -> float:
    """Return the metric that counts of a test set; 0 where it has none."""
    return next((metrics[name] for name in HEADLINES if name in metrics), 0.0)


class ClipEvaluator(Evaluator):
    """What is measured of a CLIP: zero-shot classification and retrieval, and its vision tower beside."""

    def galleries(self, vision: ShardedTower[ImageTower]) -> dict[Resize, Gallery]:
        """Return the neighbours with their features, for each way of making images square, if there are some."""
        neighbours = self.classifying()
        if neighbours is None:
            return {}
        parts = {how: self._embed(vision, neighbours, how, pooled=True) for how in self.config.eval.resizes}
        return {how: self._gallery(neighbours, pooled, images) for how, (images, pooled) in parts.items()}

    @torch.no_grad()
    def measure(
        self,
        vision: ShardedTower[ImageTower],
        text: ShardedTower[TextTower],
        name: str = "",
        *,
        galleries: Mapping[Resize, Gallery] | None = None,
        score: Callable[[Mapping[str, float]], float] = headline,
    ) -> ClipResult:
        """Classify and retrieve the test images of `eval.shards`, or of a set of `eval.sets`, by their texts.

        With neighbours k-NN and the linear probe are measured on the same features. Where images are made square in
        several ways, the result with the best score counts.
        """
        data, length = self.test_set(name), self.config.model.text.context_length
        texts = self.texts(data, lambda tokens: infer(text, (tokens,), TextTower.__call__, length))
        results = []
        for how in self.config.eval.resizes:
            images, pooled = self._embed(vision, data, how, pooled=bool(galleries))
            result = evaluate_clip(
                data, images, texts, examples=self.config.tracking.pictures, group=self.ranks.world_group
            )
            classified = self._classified(data, galleries[how], pooled, images) if galleries else {}
            results.append(replace(result, resize=how, metrics=result.metrics | of_sets(classified)))
        return max(results, key=lambda result: score(result.metrics))

    @torch.no_grad()
    def measure_teacher(self, teacher: ClipTeacher) -> dict[str, float]:
        """Metrics of a whole teacher on the test images, their work shared by all ranks."""
        data, device = self.test_set(), self.ranks.device
        texts = self.texts(data, lambda tokens: require(teacher(None, tokens)[1]), alone=True)

        def encode_image(images: Tensor) -> Tensor:
            return require(teacher(images.to(device), None)[0])

        return self.by_texts(data, texts, encode_image, teacher.image_size, alone=True)

    def _embed(
        self, vision: ShardedTower[ImageTower], data: EvalSet, how: Resize, *, pooled: bool
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [n, embed_dim] of images, which the linear probe sees too, and k-NN's features [n, width or 0]."""
        model, forward = self.config.model, ImageTower.embed_and_pool if pooled else ImageTower.__call__
        both = self.features(
            data, lambda images: tower_outputs(vision, images, forward), model.vision.image_size, how=how
        )
        return both[:, : model.embed_dim], both[:, model.embed_dim :]
