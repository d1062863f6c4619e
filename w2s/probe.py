"""What is measured of a vision tower whatever it was trained for: k-NN of its features, beside two baselines."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import Config, PrecisionConfig
from w2s.data.batch import normalize
from w2s.data.tokens import tokenize
from w2s.evaluation.dataset import EvalSet, load_eval_set
from w2s.evaluation.encode import Encoder
from w2s.evaluation.evaluate import ClipResult, evaluate_clip, evaluate_knn
from w2s.megatron.groups import Ranks
from w2s.megatron.schedule import infer
from w2s.megatron.sharded import ShardedTower
from w2s.teachers.base import Teacher
from w2s.teachers.build import build_teacher
from w2s.towers.build import build_student
from w2s.towers.clip import ImageTower, TextTower
from w2s.towers.vision import MEAN, STD


def patch_features(tower: ShardedTower[Any], images: Tensor) -> Tensor:
    """Return the patch tokens after the final norm, CLS dropped: uint8 [n, 3, S, S] to [n, patches, width]."""
    device = next(tower.parts[0].parameters()).device
    seen = normalize(images.to(device), MEAN, STD)
    tokens = 1 + tower.parts[0].shape.patches
    return infer(tower, (seen,), lambda chunk, images: chunk.patch_tokens(images), tokens).float()


def teacher_features(teacher: Teacher, images: Tensor) -> Tensor:
    """Return the teacher's patch features: uint8 [n, 3, T, T] to [n, patches, teacher width]."""
    device = next(teacher.parameters()).device
    features: Tensor = teacher(normalize(images.to(device), teacher.mean, teacher.std))
    return features


class Probe:
    """The test images of a stage, and k-NN on them.

    Args:
        config: the stage's configuration; `eval.shards` may be empty, then nothing is measured.
        ranks: this process among all; the work is shared.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self._sets: dict[tuple[str, int], EvalSet] = {}

    def test_set(self, image_size: int) -> EvalSet:
        """Return the test images (`eval.shards`) at a size in pixels."""
        return self._load("shards", image_size)

    def neighbours(self, image_size: int) -> EvalSet:
        """Return the labelled images that k-NN looks among (`eval.knn_shards`) at a size in pixels."""
        return self._load("knn_shards", image_size)

    def of_tower(self, tower: ShardedTower[Any]) -> dict[str, float]:
        """Measure a tower: `knn/top1`, `knn/top5`, chance and coverage; nothing without neighbours."""
        return self._knn(lambda images: patch_features(tower, images).mean(1), self.config.model.vision.image_size)

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
        measured = {
            "knn_random": self.of_tower(random),
            "knn_teacher": self._knn(
                lambda images: teacher.pooled(teacher_features(teacher, images)),
                teacher.image_size,
                self.ranks.world_group,
            ),
        }
        return {f"{name}/{top}": knn[f"knn/{top}"] for name, knn in measured.items() for top in ("top1", "top5")}

    def _knn(self, encode: Encoder, image_size: int, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Measure an encoder that the ranks of a model-parallel group run together, or each rank of `group` alone."""
        if not self.config.eval.knn_shards:
            return {}
        test, neighbours = self.test_set(image_size), self.neighbours(image_size)
        return evaluate_knn(self.config.eval, test, neighbours, encode=encode, group=group or self.ranks.data_group)

    def _load(self, key: str, image_size: int) -> EvalSet:
        if (key, image_size) not in self._sets:
            self._sets[key, image_size] = load_eval_set(
                getattr(self.config.eval, key),
                image_size,
                image_key=self.config.data.image_key,
                caption_key=self.config.data.caption_key,
                class_key=self.config.eval.class_key,
                option=f"eval.{key}",
            )
        return self._sets[key, image_size]


class ClipProbe(Probe):
    """What is measured of a CLIP: zero-shot classification and retrieval, beside the k-NN of its vision tower."""

    @torch.no_grad()
    def measure(self, vision: ShardedTower[ImageTower], text: ShardedTower[TextTower]) -> ClipResult:
        """Classify and retrieve the test images by their texts."""
        device, length = self.ranks.device, self.config.model.text.context_length
        tokens = 1 + self.config.model.vision.patches
        return evaluate_clip(
            self.config.eval,
            self.test_set(self.config.model.vision.image_size),
            encode_image=lambda images: infer(
                vision, (normalize(images.to(device), MEAN, STD),), ImageTower.__call__, tokens
            ),
            encode_text=lambda texts: infer(text, (texts.to(device),), TextTower.__call__, length),
            tokenize=lambda texts: tokenize(texts, length),
            group=self.ranks.data_group,
        )
