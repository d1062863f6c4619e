"""What is measured of a tower on test images: k-NN and a linear probe of its features, and a CLIP by its texts."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2s.config.sections import Config, PrecisionConfig, Resize, TeacherConfig
from w2s.config.teacher_losses import Target, TeacherLoss
from w2s.data.samples.batch import normalize, require
from w2s.data.samples.tokens import tokenize
from w2s.data.shards.shards import without_secrets
from w2s.errors import ConfigError
from w2s.evaluation.batched_features import Encoder, encode_all, of_images
from w2s.evaluation.dataset import EvalSet, load_eval_set
from w2s.evaluation.evaluate import (
    ClipResult,
    Gallery,
    Texts,
    encode_texts,
    evaluate_by_gallery,
    evaluate_clip,
    in_common,
    of_sets,
    under,
)
from w2s.evaluation.images import EvalImages, View
from w2s.evaluation.linear_probe import train_probe
from w2s.megatron.parallel.attention_maps import cls_attention
from w2s.megatron.parallel.pipeline_schedule import infer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.teachers.base import Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.clip_teacher import ClipTeacher
from w2s.teachers.features import teacher_features
from w2s.towers.build import build_student
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.masked_student import MaskedStudent
from w2s.towers.vision import channel_statistics

logger = logging.getLogger(__name__)


def patch_features(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return the patch tokens after the final norm, CLS dropped: uint8 [n, 3, S, S] to [n, patches, width]."""
    device = next(tower.chunks[0].parameters()).device
    shape = tower.chunks[0].shape
    normalized = normalize(images.to(device), *channel_statistics(shape))
    return infer(tower, (normalized,), lambda chunk, images: chunk.patch_tokens(images), shape.tokens).float()


def attention_of_cls(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return what the CLS token, or a pool's probe, attends to last: uint8 [n, 3, S, S] to float32 [n, patches]."""
    device = next(tower.chunks[0].parameters()).device
    return cls_attention(tower, normalize(images.to(device), *channel_statistics(tower.chunks[0].shape)))


HEADLINES = ("zero_shot/top1", "zero_shot/mean_average_precision", "retrieval/mean_recall_at_1")
"""The metric that counts of a test set: the first of these that it has."""


def headline(metrics: Mapping[str, float]) -> float:
    """Return the metric that counts of a test set; 0 where it has none."""
    return next((metrics[name] for name in HEADLINES if name in metrics), 0.0)


class Evaluator:
    """The test images of a stage, and k-NN and a linear probe of features of them.

    Images are decoded when they are measured, by `data.workers` processes of each rank, and each rank decodes the
    batches that it encodes alone; the ranks of a model-parallel group, which encode together, decode a share each.

    Args:
        config: the stage's configuration; without `eval.shards` and `eval.sets` nothing is measured.
        ranks: this process among all; the work is shared.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self._sets: dict[str, EvalSet] = {}
        self._told = False

    def test_set(self, name: str = "") -> EvalSet:
        """Return the test set of `eval.shards`, or one of `eval.sets`, without its images."""
        return self._load(f"eval.sets.{name}" if name else "eval.shards", self.config.eval.by_name[name])

    def gallery_set(self) -> EvalSet:
        """Return the labelled set of `eval.knn_shards`, without its images."""
        return self._load("eval.knn_shards", self.config.eval.knn_shards)

    def classifying(self) -> EvalSet | None:
        """Return the labelled set, or None without one by which an image of a test set can be classified.

        Raises:
            DataError: its images have no class each.
        """
        if not self.config.eval.knn_shards:
            return None
        data = self.gallery_set()
        if in_common(map(self.test_set, self.config.eval.by_name), data):
            return data
        if not self._told:
            logger.warning(
                "no k-NN and linear probe: no test image has a class of eval.knn_shards=%s, which are called %s",
                without_secrets(self.config.eval.knn_shards),
                ", ".join([*data.class_names[:3], "..."]),
            )
        self._told = True
        return None

    def images(self, data: EvalSet, *sizes: int, how: Resize | None = None, alone: bool = False) -> EvalImages:
        """Return the images of a set at some sizes in pixels.

        Args:
            data: the set.
            sizes: sides of the images.
            how: how they become square; None as they do first.
            alone: whether each rank encodes them alone, instead of together with its model-parallel group.
        """
        return EvalImages(
            data=data,
            numbers=np.arange(len(data)),
            view=View(
                sizes=sizes,
                how=how or self.config.eval.resizes[0],
                image_key=self.config.data.image_key,
                frames=self.config.data.frames,
            ),
            workers=self.config.data.workers,
            group=None if alone else self.ranks.model_group,
            device=self.ranks.device,
        )

    def evaluate_tower(self, tower: ShardedTower[Any]) -> dict[str, float]:
        """Measure a tower by `knn` and `linear_probe` (see `evaluate_by_gallery`); nothing without neighbours."""
        return self._by_neighbours(
            "", lambda images: patch_features(tower, images).mean(1), self.config.model.vision.image_size
        )

    def baselines(self) -> dict[str, float]:
        """Measure a tower with random weights (`knn_random/…`) and the teacher (`knn_teacher/…`), if wanted."""
        config = self.config
        if not config.eval.baselines or self.classifying() is None:
            return {}
        vision = config.model.vision
        plain = replace(config, precision=PrecisionConfig(linear="local"))
        random = build_student(plain, [Target(1)], torch.float32, self.ranks.device)
        measured = self._by_neighbours(
            "_random", lambda images: patch_features(random, images).mean(1), vision.image_size
        )
        teachers = [teacher_loss.teacher for teacher_loss in config.teacher_losses]
        for teacher in teachers:
            name = "_teacher" if len(teachers) == 1 else f"_teacher_{teacher.name}"
            measured |= self._by_neighbours(name, *self._pooled_by(teacher), alone=True)
        return {name: value for name, value in measured.items() if name.endswith(("/top1", "/top5"))}

    def _pooled_by(self, teacher: TeacherConfig) -> tuple[Encoder, int]:
        """What gives a teacher's pooled features of images, and the side of these in pixels."""
        config = self.config
        built = build_teacher(
            teacher,
            grid=config.model.vision.grid,
            device=self.ranks.device,
            root=config.run.root,
            parallel=config.parallel,
        )
        return lambda images: built.pooled(teacher_features(built, images).patches), built.image_size

    def evaluate_as_clip(
        self,
        student: ShardedTower[MaskedStudent],
        embed: Callable[..., Tensor],
        teacher_loss: TeacherLoss,
        teacher: Teacher,
    ) -> dict[str, float]:
        """Measure a student with a teacher's text tower as a CLIP, and the teacher's own under `teacher/`.

        Nothing without a summary target in the space that the teacher shares with text, or without a text tower.

        Args:
            student: the student.
            embed: takes a chunk of it and images, embeds them as that teacher does.
            teacher_loss: how it has learnt from the teacher.
            teacher: the teacher.
        """
        config, device = self.config, self.ranks.device
        shares_space = teacher_loss.summary == "cls" and config.model.embed_dim == teacher.summary_width
        if not (teacher_loss.summary_weight and shares_space):
            if teacher_loss.summary_weight:
                logger.info(
                    "the student is not measured as a CLIP: its summary is not what its teacher shares with text"
                )
            return {}
        from w2s.teachers.text import build_text_teacher  # with open_clip: not before the first step

        try:
            text = build_text_teacher(
                teacher_loss.teacher,
                context_length=config.model.text.context_length,
                device=device,
                root=config.run.root,
            )
        except ConfigError as error:
            logger.info("the student is not measured as a CLIP: %s", error)
            return {}

        def encode_image(images: Tensor) -> Tensor:
            vision = config.model.vision
            normalized = normalize(images.to(device), *channel_statistics(vision))
            return infer(student, (normalized,), embed, vision.tokens)

        def encode_with_teacher(images: Tensor) -> Tensor:
            return teacher_features(teacher, images).summary

        data = self.test_set()
        texts = self.texts(data, text, alone=True)
        group = self.ranks.world_group
        ours = evaluate_clip(
            data, self.features(data, encode_image, config.model.vision.image_size), texts, group=group
        )
        theirs = evaluate_clip(
            data, self.features(data, encode_with_teacher, teacher.image_size, alone=True), texts, group=group
        )
        return ours.metrics | under("teacher", theirs.metrics)

    def texts(self, data: EvalSet, encode: Encoder, *, alone: bool = False) -> Texts:
        """Features of what a test set says in words; `alone` as in `images`."""
        device, length = self.ranks.device, self.config.model.text.context_length
        return encode_texts(
            self.config.eval,
            data,
            encode_text=lambda tokens: encode(tokens.to(device)),
            tokenize=lambda texts: tokenize(texts, length),
            group=self._sharing(alone),
        )

    def features(
        self, data: EvalSet, encode: Encoder, image_size: int, *, how: Resize | None = None, alone: bool = False
    ) -> Tensor:
        """Features [n, d] of the images of a set, the work shared by the ranks; see `images`."""
        images = self.images(data, image_size, how=how, alone=alone)
        return encode_all(of_images(encode), images, self.config.eval.batch_size, self._sharing(alone))

    def _sharing(self, alone: bool) -> Any:
        """The ranks that share batches: all, or one of each model-parallel group."""
        return self.ranks.world_group if alone else self.ranks.data_group

    def _by_neighbours(self, suffix: str, encode: Encoder, image_size: int, *, alone: bool = False) -> dict[str, float]:
        """Measure an encoder by labelled neighbours, under `knn` and `linear_probe` with a suffix."""
        neighbours = self.classifying()
        if neighbours is None:
            return {}
        known = self.features(neighbours, encode, image_size, alone=alone)
        gallery = self._gallery(neighbours, known, known)
        measured = {}
        for name in self.config.eval.by_name:
            data = self.test_set(name)
            features = (
                self.features(data, encode, image_size, alone=alone) if in_common([data], neighbours) else known[:0]
            )
            metrics_by_kind = self._classified(data, gallery, features, features)
            measured[name] = of_sets({f"{kind}{suffix}": metrics for kind, metrics in metrics_by_kind.items()})
        return of_sets(measured)

    def _gallery(self, neighbours: EvalSet, features: Tensor, probed: Tensor) -> Gallery:
        if not self.config.eval.linear_probe or neighbours.labels is None:
            return Gallery(neighbours, features)
        ranks = self.ranks
        probe = train_probe(probed, neighbours.labels, rank=ranks.rank, size=ranks.world_size, gather=ranks.gather)
        return Gallery(neighbours, features, probe)

    def _classified(
        self, data: EvalSet, gallery: Gallery, features: Tensor, probed: Tensor
    ) -> dict[str, dict[str, float]]:
        return evaluate_by_gallery(
            data, gallery, features=features, probed=probed, k=self.config.eval.knn_k, group=self.ranks.world_group
        )

    def _load(self, option: str, shards: str) -> EvalSet:
        if option not in self._sets:
            self._sets[option] = load_eval_set(
                shards,
                caption_key=self.config.data.caption_key,
                class_key=self.config.eval.class_key,
                option=option,
                rank=self.ranks.rank,
                size=self.ranks.world_size,
                gather=self.ranks.gather,
            )
        return self._sets[option]


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
        images = self.features(
            data, lambda images: require(teacher(images.to(device), None)[0]), teacher.image_size, alone=True
        )
        return evaluate_clip(data, images, texts, group=self.ranks.world_group).metrics

    def _embed(
        self, vision: ShardedTower[ImageTower], data: EvalSet, how: Resize, *, pooled: bool
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [n, embed_dim] of images, which the linear probe sees too, and k-NN's features [n, width or 0]."""
        model, device = self.config.model, self.ranks.device
        forward = ImageTower.embed_and_pool if pooled else ImageTower.__call__

        def encode(images: Tensor) -> Tensor:
            normalized = normalize(images.to(device), *channel_statistics(model.vision))
            return infer(vision, (normalized,), forward, model.vision.tokens)

        both = self.features(data, encode, model.vision.image_size, how=how)
        return both[:, : model.embed_dim], both[:, model.embed_dim :]
