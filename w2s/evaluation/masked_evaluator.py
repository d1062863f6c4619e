"""What is measured of a masked student: its predictions, its tower, and the CLIP that it is with a teacher's texts."""

import copy
import logging
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from w2s.config.sections import Config
from w2s.config.teacher_losses import Target
from w2s.data.samples.batch import normalize
from w2s.data.samples.sample import SampleSpec, draw_mask
from w2s.errors import ConfigError
from w2s.evaluation.batched_features import TensorItems, encode_all, of_images
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.evaluator import Evaluator
from w2s.evaluation.images import ImageBatch
from w2s.evaluation.metric_names import under
from w2s.evaluation.tower_features import attention_of_cls, patch_features, tower_outputs
from w2s.megatron.parallel.pipeline_schedule import infer
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import ShardedTower
from w2s.objectives.masked_loss import masked_cosines
from w2s.teachers.distillation.masked import MaskedDistillation
from w2s.teachers.distillation.masked_teacher import MaskedTeacher
from w2s.teachers.distillation.phi_s import PhiS
from w2s.teachers.distillation.targets import TargetNorm
from w2s.towers.masked_student import (
    MaskedStudent,
    Outputs,
    all_patch_indices,
    gather_patches,
    patch_indices_to_predict,
    scatter_patches,
    unflatten_outputs,
)
from w2s.towers.vision import channel_statistics
from w2s.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

Student = ShardedTower[MaskedStudent]


class MaskedEvaluator(Evaluator):
    """The measures and pictures of the masked stage, whose masks are drawn as `spec` says."""

    def __init__(self, config: Config, ranks: Ranks, spec: SampleSpec, distillation: MaskedDistillation) -> None:
        super().__init__(config, ranks)
        self.spec, self.distillation = spec, distillation
        # Which patches are predicted, as the names of the metrics say it.
        self.kind = config.mim.predict if config.mim.masked_patches else "unmasked"
        self.sizes = config.model.vision.image_size, *distillation.image_sizes

    def measure(self, student: Student) -> dict[str, float]:
        """Cosines on the test images beside those of the best constant predictions, and k-NN of the features."""
        if not self.config.eval.shards:
            return {}
        return self._cosines(student, "test", self.test_set()) | self.evaluate_tower(student)

    def measure_finished(self, student: Student) -> dict[str, float]:
        """Measure beside that its baselines, and the student as a CLIP."""
        if not self.config.eval.shards:
            return {}
        as_clips = [self._as_clip(student, index) for index in range(len(self.distillation.teachers))]
        metrics = self.measure(student) | self.distillation.by_teacher(as_clips) | self.baselines()
        if self.config.eval.knn_shards:
            metrics |= self._cosines(student, "neighbours", self.gallery_set())
        return metrics

    def draw(self, student: Student, tracker: Tracker) -> None:
        """Draw, of some test images, the predictions, the features as colours, and what the class token attends to."""
        count = self.config.tracking.pictures
        if not count:
            return
        # Not before the first step, for matplotlib's sake.
        from w2s.tracking.report.pictures import attention_picture, features_picture, masked_picture

        data, teachers = self.test_set(), self.distillation.teachers
        indices = torch.linspace(0, len(data) - 1, count).long().unique()
        batch = ImageBatch(indices, self.images(data, *self.sizes).only(indices.numpy()).read())
        predictions, targets, masks = self._predict(student, batch, [teacher.norm for teacher in teachers])
        shown, features = batch.images, patch_features(student, batch.images)
        for teacher, predicted, target in zip(teachers, predictions, targets, strict=True):
            suffix, cosines = (
                f"_{teacher.name}" if teacher.name else "",
                masked_cosines(predicted.patches, target.patches),
            )
            masked = partial(masked_picture, images=shown, masks=masks, cosines=cosines, kind=self.kind)
            tracker.picture(f"masked{suffix}", masked)
            colours = partial(features_picture, images=shown, student=features, teacher=target.patches)
            tracker.picture(f"features{suffix}", colours)
        if self.config.model.vision.class_tokens or any(target.summary_width for target in self.distillation.targets):
            attention = attention_of_cls(student, shown)
            tracker.picture("attention", lambda path: attention_picture(path, shown, attention))

    def _cosines(self, student: Student, name: str, data: EvalSet) -> dict[str, float]:
        """Cosines with each teacher, and of the best constant predictions: `NAME/…`, under the teachers' names."""
        norms = [self._test_target_norm(teacher) for teacher in self.distillation.teachers]

        def measure(batch: ImageBatch) -> Tensor:
            predictions, targets, masks = self._predict(student, batch, norms)
            patch_indices = patch_indices_to_predict(masks, self.config.mim)
            measured = [_measured(*each, patch_indices) for each in zip(predictions, targets, strict=True)]
            return torch.cat(measured, dim=1)

        images = self.images(data, *self.sizes)
        mean = encode_all(measure, images, self.config.eval.batch_size, self.ranks.data_group).mean(0)
        targets = self.distillation.targets
        parts = mean.split([2 + target.width + target.summary_width for target in targets])
        metrics = (self._cosines_of(part, target) for part, target in zip(parts, targets, strict=True))
        return self.distillation.by_teacher(under(name, each) for each in metrics)

    def _cosines_of(self, mean: Tensor, target: Target) -> dict[str, float]:
        """The metrics of a teacher, from the mean of what `_measured` gave."""
        cosine, direction, summary, summary_direction = mean.split([1, target.width, 1, target.summary_width])
        metrics = {f"{self.kind}_cosine": cosine.item(), "constant_cosine": direction.norm().item()}
        if target.summary_width:
            constant = summary_direction.norm().item()
            metrics |= {"summary_cosine": summary.item(), "summary_constant_cosine": constant}
        return metrics

    @torch.no_grad()
    def _predict(
        self, student: Student, batch: ImageBatch, norms: Sequence[TargetNorm | PhiS]
    ) -> tuple[list[Outputs], list[Outputs], Tensor]:
        """Predictions, targets and masks [n, patches] of images at `sizes`, at all their patches.

        Predictions are NaN at patches that the student does not see.
        """
        vision, mim, device = self.config.model.vision, self.config.mim, self.ranks.device
        drawn = [draw_mask(self.spec, 0, index) for index in batch.indices.tolist()]
        masks = torch.from_numpy(np.stack(drawn)).to(device)
        images, *views = batch.views
        normalized = normalize(images.to(device), *channel_statistics(vision))
        patch_indices = patch_indices_to_predict(masks, mim) if mim.predict == "visible" else all_patch_indices(masks)
        seq_len = vision.class_tokens + mim.num_visible(vision.patches)
        flattened = infer(student, (normalized, masks, patch_indices), MaskedStudent.predict, seq_len).float()
        predictions = [
            each._replace(patches=scatter_patches(each.patches, patch_indices, vision.patches))
            for each in unflatten_outputs(flattened, self.distillation.targets)
        ]
        targets = []
        for teacher, norm in zip(self.distillation.teachers, norms, strict=True):
            outputs = self._run_teacher(teacher, self.distillation.view_of(teacher, views))
            targets.append(outputs._replace(patches=norm(outputs.patches, update=False)))
        return predictions, targets, masks

    def _run_teacher(self, teacher: MaskedTeacher, images: Tensor) -> Outputs:
        """A teacher's features of images that the ranks of a model-parallel group have; each computes a share."""
        group = self.ranks.model_group
        share = math.ceil(len(images) / dist.get_world_size(group))
        return Outputs.unflatten(encode_all(teacher.flat_outputs, TensorItems(images), share, group), teacher.target)

    def _test_target_norm(self, teacher: MaskedTeacher) -> TargetNorm | PhiS:
        """The running statistics; before the first step, those of some of the images that k-NN looks among."""
        norm = copy.deepcopy(teacher.norm)
        if not norm.ready:
            size, group = teacher.teacher.image_size, self.ranks.world_group
            data = self.gallery_set() if self.config.eval.knn_shards else self.test_set()
            indices = np.arange(0, len(data), max(1, len(data) // self.config.eval.batch_size))
            share = math.ceil(len(indices) / dist.get_world_size(group))
            images = self.images(data, size, alone=True).only(indices)
            flattened = encode_all(of_images(teacher.flat_outputs), images, share, group)
            norm(Outputs.unflatten(flattened, teacher.target).patches, update=True)
        return norm

    def _as_clip(self, student: Student, index: int) -> dict[str, float]:
        """Measure the student as the CLIP of a teacher, with its text tower, and the teacher itself under `teacher/`.

        Nothing without a summary target in the space that the teacher shares with text, or without a text tower.
        """
        config, its = self.config, self.distillation.teachers[index]
        teacher, teacher_loss = its.teacher, its.teacher_loss
        if not teacher_loss.summary_weight:
            return {}
        if teacher_loss.summary != "cls" or config.model.embed_dim != teacher.summary_width:
            logger.info("the student is not measured as a CLIP: its summary is not what its teacher shares with text")
            return {}
        from w2s.teachers.text import build_text_teacher  # with open_clip: not before the first step

        length, device = config.model.text.context_length, self.ranks.device
        try:
            text = build_text_teacher(teacher_loss.teacher, context_length=length, device=device, root=config.run.root)
        except ConfigError as error:
            logger.info("the student is not measured as a CLIP: %s", error)
            return {}

        def encode_image(images: Tensor) -> Tensor:
            return tower_outputs(student, images, partial(MaskedStudent.embed, teacher=index))

        def encode_with_teacher(images: Tensor) -> Tensor:
            return teacher.features_of(images).summary

        data = self.test_set()
        texts = self.texts(data, text, alone=True)
        ours = self.by_texts(data, texts, encode_image, config.model.vision.image_size)
        theirs = self.by_texts(data, texts, encode_with_teacher, teacher.image_size, alone=True)
        return ours | under("teacher", theirs)


def _measured(predictions: Outputs, targets: Outputs, patch_indices: Tensor) -> Tensor:
    """Of each image the mean cosine and the mean direction of its targets, and those of the summary.

    It is [n, 1 + d + 1 + e]; without a summary its cosine is 0.
    """
    at = [gather_patches(each.patches, patch_indices) for each in (predictions, targets)]
    columns = [masked_cosines(*at).mean(1, keepdim=True), F.normalize(at[1], dim=-1).mean(1)]
    if predictions.summary is None or targets.summary is None:
        return torch.cat([*columns, at[0].new_zeros(len(patch_indices), 1)], dim=1)
    summary = masked_cosines(predictions.summary, targets.summary)[:, None]
    return torch.cat([*columns, summary, F.normalize(targets.summary, dim=-1)], dim=1)
