"""What is measured of a vision tower whatever it was trained for: k-NN of its features, beside two baselines."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import Config, PrecisionConfig
from w2s.data.batch import normalize
from w2s.data.tokens import tokenize
from w2s.errors import ConfigError
from w2s.evaluation.dataset import EvalSet, load_eval_set
from w2s.evaluation.encode import Encoder
from w2s.evaluation.evaluate import ClipResult, evaluate_clip, evaluate_knn, of_sets, under
from w2s.megatron.groups import Ranks
from w2s.megatron.schedule import infer
from w2s.megatron.sharded import ShardedTower
from w2s.teachers.base import Features, Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.text import build_text_teacher
from w2s.towers.build import build_student
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.masked import MaskedStudent
from w2s.towers.vision import MEAN, STD

logger = logging.getLogger(__name__)


def patch_features(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return the patch tokens after the final norm, CLS dropped: uint8 [n, 3, S, S] to [n, patches, width]."""
    device = next(tower.parts[0].parameters()).device
    seen = normalize(images.to(device), MEAN, STD)
    tokens = 1 + tower.parts[0].shape.patches
    return infer(tower, (seen,), lambda chunk, images: chunk.patch_tokens(images), tokens).float()


def teacher_features(teacher: Teacher, images: Tensor, layers: Sequence[int] = ()) -> Features:
    """Return the teacher's features of uint8 images [n, 3, T, T], and those after some of its layers."""
    device = next(teacher.parameters()).device
    features: Features = teacher(normalize(images.to(device), teacher.mean, teacher.std), layers)
    return features


class Probe:
    """The test images of a stage, and k-NN on them.

    Args:
        config: the stage's configuration; without `eval.shards` and `eval.sets` nothing is measured.
        ranks: this process among all; the work is shared.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self._sets: dict[tuple[str, int], EvalSet] = {}

    def test_set(self, image_size: int, name: str = "") -> EvalSet:
        """Return the test images of `eval.shards`, or of a set of `eval.sets`, at a size in pixels."""
        option = f"eval.sets.{name}" if name else "eval.shards"
        return self._load(option, self.config.eval.by_name[name], image_size)

    def neighbours(self, image_size: int) -> EvalSet:
        """Return the labelled images that k-NN looks among (`eval.knn_shards`) at a size in pixels."""
        return self._load("eval.knn_shards", self.config.eval.knn_shards, image_size)

    def of_tower(self, tower: ShardedTower[Any]) -> dict[str, float]:
        """Measure a tower: `knn/top1`, `knn/top5`, chance and coverage; nothing without neighbours."""
        return self._knn(
            "knn", lambda images: patch_features(tower, images).mean(1), self.config.model.vision.image_size
        )

    def baselines(self) -> dict[str, float]:
        """Measure a tower with random weights (`knn_random/…`) and the teacher (`knn_teacher/…`), if wanted."""
        config = self.config
        if not config.eval.baselines or not config.eval.knn_shards:
            return {}
        vision = config.model.vision
        plain = replace(config, precision=PrecisionConfig(linear="local"))
        random = build_student(plain, 1, torch.float32, self.ranks.device)
        teacher = build_teacher(
            config.teacher,
            grid=vision.grid,
            device=self.ranks.device,
            root=config.run.root,
            parallel=config.parallel,
        )
        measured = self._knn(
            "knn_random", lambda images: patch_features(random, images).mean(1), vision.image_size
        ) | self._knn(
            "knn_teacher",
            lambda images: teacher.pooled(teacher_features(teacher, images).patches),
            teacher.image_size,
            self.ranks.world_group,
        )
        return {name: value for name, value in measured.items() if name.endswith(("/top1", "/top5"))}

    def as_clip(self, student: ShardedTower[MaskedStudent], teacher: Teacher) -> dict[str, float]:
        """Measure a student with its teacher's text tower as a CLIP, and the teacher's own under `teacher/`.

        Nothing without a summary target in the space that the teacher shares with text, or without a text tower.
        """
        config, device = self.config, self.ranks.device
        shares_space = config.mim.summary == "cls" and config.model.embed_dim == teacher.summary_width
        if not (config.mim.summary_weight and shares_space):
            if config.mim.summary_weight:
                logger.info(
                    "the student is not measured as a CLIP: its summary is not what its teacher shares with text"
                )
            return {}
        try:
            text = build_text_teacher(
                config.teacher, context_length=config.model.text.context_length, device=device, root=config.run.root
            )
        except ConfigError as error:
            logger.info("the student is not measured as a CLIP: %s", error)
            return {}

        def see(images: Tensor) -> Tensor:
            seen = normalize(images.to(device), MEAN, STD)
            return infer(student, (seen,), MaskedStudent.embed, 1 + config.model.vision.patches)

        def show(images: Tensor) -> Tensor:
            return teacher_features(teacher, images).summary

        size, group = config.model.vision.image_size, self.ranks.world_group
        ours = self._clip(see, text, self.test_set(size), self.ranks.data_group)
        theirs = self._clip(show, text, self.test_set(teacher.image_size), group)
        return ours.metrics | under("teacher", theirs.metrics)

    def _clip(self, encode_image: Encoder, encode_text: Encoder, test: EvalSet, group: dist.ProcessGroup) -> ClipResult:
        """Classify and retrieve test images by their texts; the ranks of `group` share the work."""
        device, length = self.ranks.device, self.config.model.text.context_length
        return evaluate_clip(
            self.config.eval,
            test,
            encode_image=encode_image,
            encode_text=lambda texts: encode_text(texts.to(device)),
            tokenize=lambda texts: tokenize(texts, length),
            group=group,
        )

    def _knn(
        self, title: str, encode: Encoder, image_size: int, group: dist.ProcessGroup | None = None
    ) -> dict[str, float]:
        """Measure an encoder that the ranks of a model-parallel group run together, or each rank of `group` alone."""
        if not self.config.eval.knn_shards:
            return {}
        measured = evaluate_knn(
            self.config.eval,
            {name: self.test_set(image_size, name) for name in self.config.eval.by_name},
            self.neighbours(image_size),
            encode=encode,
            group=group or self.ranks.data_group,
        )
        return of_sets({name: under(title, metrics) for name, metrics in measured.items()})

    def _load(self, option: str, shards: str, image_size: int) -> EvalSet:
        if (option, image_size) not in self._sets:
            self._sets[option, image_size] = load_eval_set(
                shards,
                image_size,
                how=self.config.eval.resize,
                image_key=self.config.data.image_key,
                caption_key=self.config.data.caption_key,
                class_key=self.config.eval.class_key,
                frames=self.config.data.frames,
                option=option,
            )
        return self._sets[option, image_size]


class ClipProbe(Probe):
    """What is measured of a CLIP: zero-shot classification and retrieval, beside the k-NN of its vision tower."""

    @torch.no_grad()
    def measure(self, vision: ShardedTower[ImageTower], text: ShardedTower[TextTower], name: str = "") -> ClipResult:
        """Classify and retrieve the test images of `eval.shards`, or of a set of `eval.sets`, by their texts."""
        device, length = self.ranks.device, self.config.model.text.context_length
        tokens = 1 + self.config.model.vision.patches
        return self._clip(
            lambda images: infer(vision, (normalize(images.to(device), MEAN, STD),), ImageTower.__call__, tokens),
            lambda texts: infer(text, (texts,), TextTower.__call__, length),
            self.test_set(self.config.model.vision.image_size, name),
            self.ranks.data_group,
        )
