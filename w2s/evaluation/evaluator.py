"""What is measured of any vision tower on test images: k-NN and a linear probe of its features."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w2s.config.sections import Config, PrecisionConfig, Resize, TeacherConfig
from w2s.config.teacher_losses import Target
from w2s.data.samples.tokens import tokenize
from w2s.data.shards.listing import without_secrets
from w2s.evaluation.batched_features import Encoder, encode_all, of_images
from w2s.evaluation.by_gallery import Gallery, evaluate_by_gallery, in_common
from w2s.evaluation.by_texts import Texts, encode_texts, evaluate_clip
from w2s.evaluation.dataset import EvalSet, load_eval_set
from w2s.evaluation.images import EvalImages, View
from w2s.evaluation.metric_names import of_sets
from w2s.evaluation.scores.linear_probe import train_probe
from w2s.evaluation.tower_features import patch_features
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.teachers.build import build_teacher
from w2s.towers.build import build_student

logger = logging.getLogger(__name__)


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
            indices=np.arange(len(data)),
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
        return lambda images: built.pooled(built.features_of(images).patches), built.image_size

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

    def by_texts(
        self, data: EvalSet, texts: Texts, encode: Encoder, image_size: int, *, alone: bool = False
    ) -> dict[str, float]:
        """Measure an encoder of images by the texts of a set, see `evaluate_clip`; `alone` as in `images`."""
        images = self.features(data, encode, image_size, alone=alone)
        return evaluate_clip(data, images, texts, group=self.ranks.world_group).metrics

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
