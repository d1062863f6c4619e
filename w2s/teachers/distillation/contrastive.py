"""Distillation beside the contrastive loss: a finished CLIP embeds the batch, for the first steps or all of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.config.sections import Config, TeacherConfig
from w2s.config.teacher_checks import check_teacher_widths
from w2s.data.samples.batch import Batch, require
from w2s.errors import ConfigError, DataError
from w2s.megatron.parallel.process_groups import Ranks
from w2s.objectives.distillation_loss import affinity_loss, feature_loss
from w2s.optim.lr_schedule import falling_weight
from w2s.teachers.build import build_teacher
from w2s.teachers.clip_teacher import ClipTeacher

SCORES = ("retrieval/mean_recall_at_10", "zero_shot/top1")
"""What says which of two CLIPs is better: the first of these that the test set gives."""


class ContrastiveDistillation:
    """A CLIP that the contrastive stage is distilled from in its first steps, or all.

    Attributes:
        teacher: the frozen CLIP.
        step: the training step whose batch it has seen last, from 0.
        passed: whether the student has been seen to be better than the teacher.

    Raises:
        ConfigError: the teacher lacks a tower that is needed, or its embeddings have another width than the student's.
    """

    def __init__(self, config: Config, source: TeacherConfig, ranks: Ranks) -> None:
        self.config, self.settings, self.ranks = config, config.clip.distill, ranks
        self.teacher = _build(config, source, ranks)
        self.step, self.passed = 0, False
        self.last = self.settings.last_step(config.train)
        self._score: float | None = None

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Side of the teacher's images in pixels; empty where it sees none."""
        return (self.teacher.image_size,) if self.teacher.vision is not None else ()

    @property
    def on(self) -> bool:
        """Whether the loss has the distillation term in this step."""
        return not self.passed and self.step < self.last

    @property
    def weight(self) -> float:
        """Factor on the distillation loss in this step."""
        linear = falling_weight(self.step, self.last, 1.0)
        left = {"none": 1.0, "linear": linear, "cosine": (1 - math.cos(math.pi * linear)) / 2}
        return self.settings.weight * left[self.settings.decay]

    def run_teacher(self, batch: Batch, micro_batch: int) -> Batch:
        """Exchange images at the teacher's size for its embeddings of images and captions, while it is `on`.

        Args:
            batch: this rank's samples of a step, on the host.
            micro_batch: how many samples it sees at a time.
        """
        self.step = int(batch.indices.numpy()[0]) // self.config.train.global_batch
        batch = batch.to(self.ranks.device)
        if not self.on:
            return dataclasses.replace(batch, teacher_images=())
        parts = [self.teacher(_teacher_view(part), part.tokens) for part in batch.split(micro_batch)]
        images, texts = (None if side[0] is None else torch.cat(side) for side in zip(*parts, strict=True))
        return dataclasses.replace(batch, teacher_images=(), teacher_summaries=images, teacher_text_summaries=texts)

    def loss(self, images: Tensor, texts: Tensor, scale: Tensor, batch: Batch, group: ProcessGroup) -> Tensor:
        """What separates the student's embeddings [n, d], L2-normalised, from the teacher's.

        Args:
            images: the student's.
            texts: the student's.
            scale: its inverse temperature.
            batch: what `run_teacher` returned, all of it.
            group: the data-parallel ranks, over which affinities go.
        """
        kind, sides = self.settings.kind, self.settings.sides
        loss = images.new_zeros(())
        if kind != "affinity":
            pairs = {"image": (images, batch.teacher_summaries), "text": (texts, batch.teacher_text_summaries)}
            loss = loss + sum(feature_loss(pairs[side][0], require(pairs[side][1])) for side in sides)
        if kind != "feature":
            loss = loss + affinity_loss(
                images if "image" in sides else images.detach(),
                texts if "text" in sides else texts.detach(),
                scale,
                require(batch.teacher_summaries),
                require(batch.teacher_text_summaries),
                self.teacher.logit_scale,
                group=group,
                tile=self.config.clip.tile,
            )
        return loss

    def judge(
        self, student: Mapping[str, float], measure: Callable[[ClipTeacher], Mapping[str, float]]
    ) -> dict[str, float]:
        """Let the teacher go if the student has passed it; every rank calls, and all decide alike.

        Args:
            student: its metrics on the test set.
            measure: measures a teacher on the test set.

        Returns:
            The teacher's score there under `teacher/`; nothing where nobody asks, or the teacher is gone already.

        Raises:
            DataError: the test set has neither captions nor classes.
        """
        if not self.settings.until_better or not self.on:
            return {}
        name = next((name for name in SCORES if name in student), None)
        if name is None:
            raise DataError("clip.distill.until_better=true: eval.shards has nothing to compare, see eval.retrieval")
        if self._score is None:
            self._score = measure(self.teacher)[name]
        self.passed = self.ranks.any(student[name] > self._score)
        return {f"teacher/{name}": self._score}

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold, equal on all ranks."""
        return {"teacher_passed": torch.tensor(self.passed)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, or what a run without a teacher left."""
        self.passed = "teacher_passed" in state and bool(state["teacher_passed"])


def _teacher_view(batch: Batch) -> Tensor | None:
    """The teacher's view of the images, if it has one."""
    return batch.teacher_images[0] if batch.teacher_images else None


def _build(config: Config, source: TeacherConfig, ranks: Ranks) -> ClipTeacher:
    """The towers of a teacher that are needed."""
    settings, model, root = config.clip.distill, config.model, config.run.root
    text = vision = None
    try:
        if "text" in settings.teacher_sides:
            from w2s.teachers.text import build_text_teacher  # with open_clip, which others do without

            text = build_text_teacher(source, context_length=model.text.context_length, device=ranks.device, root=root)
        if "image" in settings.teacher_sides:
            vision = build_teacher(
                source, grid=model.vision.grid, device=ranks.device, root=root, parallel=config.parallel
            )
    except ConfigError as error:
        raise ConfigError(f"clip.distill.source={settings.source}: {error}") from error
    teacher = ClipTeacher(vision, text)
    check_teacher_widths(config, teacher.widths)
    return teacher
