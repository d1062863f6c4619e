"""The masked stage: a student learns to reproduce, at masked patches, the features of a frozen teacher."""

import copy
import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.checkpoint.handover import Handover, take_over
from w2s.config.sections import Config
from w2s.data.batch import Batch, gather_batch, given, normalize
from w2s.data.sample import SampleSpec, draw_mask
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.encode import Rows, encode_all, of_images
from w2s.evaluation.evaluate import under
from w2s.evaluation.images import ImageBatch
from w2s.megatron.groups import Ranks
from w2s.megatron.optimizer import Optimizer, Towers
from w2s.megatron.schedule import Loss, Reported, forward_backward, infer, means
from w2s.megatron.sharded import data_parallel
from w2s.objectives.layers import LayerLosses
from w2s.objectives.masked import LOSSES, constant_cosine, masked_cosines
from w2s.objectives.summary import summary_loss
from w2s.optim.schedule import falling_weight
from w2s.precision import compute_dtype
from w2s.probe import Probe, attention_of_cls, patch_features, teacher_features
from w2s.teachers.base import Features, Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.targets import TargetNorm
from w2s.towers.build import build_student
from w2s.towers.masked import MaskedStudent, Outputs, at_places, everywhere, places_to_predict, put_at_places
from w2s.towers.vision import channel_statistics
from w2s.tracking.tracker import Tracker
from w2s.trainer import train_stage


def run(config: Config) -> None:
    """Train the masked stage."""
    train_stage(config, MaskedStage)


def sample_spec(config: Config, teacher_size: int) -> SampleSpec:
    """What the stage wants of a sample, with a teacher whose input has `teacher_size` pixels a side."""
    return SampleSpec.of(
        config,
        teacher_size=teacher_size,
        masked_patches=config.mim.masked_patches,
        min_block=config.mim.min_block,
        block_aspect=config.mim.block_aspect,
        uniform_mask=config.mim.mask == "uniform",
    )


class MaskedStage:
    """Builds the teacher and the student; `step` is the stage."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        vision, dtype = config.model.vision, compute_dtype(config.precision)
        self.teacher = build_teacher(
            config.teacher, grid=vision.grid, device=ranks.device, root=config.run.root, parallel=config.parallel
        )
        self.target_norm = TargetNorm(self.teacher.width, config.teacher.target_norm).to(ranks.device)
        self.teacher.check_layers([pair.teacher for pair in config.mim.layers], "mim.layers")
        layers, width = [pair.student for pair in config.mim.layers], self.teacher.layer_width
        norms = [TargetNorm(width, config.teacher.target_norm) for _ in layers]
        self.layer_norms = nn.ModuleList(norms).to(ranks.device)
        self.summary_width = config.mim.summary_width(self.teacher.width, self.teacher.summary_width)
        student = build_student(
            config, self.teacher.width, dtype, ranks.device, dict.fromkeys(layers, width), self.summary_width
        )
        self.student = data_parallel(student, config.parallel, config.precision)
        self.towers: Towers = {"vision": self.student}
        self.optimizer = Optimizer(self.towers, config.optim, dtype, config.init.scratch)
        self.probe = Probe(config, ranks)
        self.spec = sample_spec(config, self.teacher.image_size)
        self.widths = [self.teacher.width] + [width] * len(self.layer_norms)
        self.tokens = vision.class_tokens + config.mim.seen(vision.patches)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step: the teacher sees whole images, the student masked ones, and predicts targets at some patches.

        Args:
            batch: this rank's share of the samples of its model-parallel group. The teacher sees no others here; one
                gather gives the group's images and targets to all its ranks.
        """
        whole = gather_batch(self._teach(batch.to(self.ranks.device)), self.ranks.model_group)
        micro_batches = whole.split(self.config.train.micro_batch)
        learn = LayerLosses(self.config.mim, self._layers_weight(batch) / len(micro_batches))

        def forward(student: MaskedStudent, micro: Batch) -> tuple[Tensor, Loss]:
            masks = given(micro.masks)
            patches, *layers = given(micro.targets).split(self.widths, dim=-1)
            targets = Outputs(patches, micro.summaries)
            images = normalize(micro.images, *channel_statistics(self.config.model.vision))
            predictions = student(images, masks, self._places(masks), learn.of(layers), micro.branches)

            def loss(predictions: Outputs) -> tuple[Tensor, Reported]:
                value = self._loss(predictions, targets)
                return value, {"loss": value.detach(), **self._cosines(predictions, targets)}

            return predictions, loss

        rows = len(micro_batches[0]) * self.tokens
        reports = forward_backward(self.student, micro_batches, forward, rows)
        return {**means(reports), **means(learn.reports), "teacher_images_per_rank": torch.tensor(float(len(batch)))}

    def _teach(self, batch: Batch) -> Batch:
        """Exchange the images at the teacher's size for its features of them, at the patches to predict."""
        images, masks = given(batch.teacher_images), self._masks(batch)
        layers, places = [pair.teacher for pair in self.config.mim.layers], self._places(masks)
        parts = images.split(self.config.train.micro_batch)
        features = Features.join([teacher_features(self.teacher, part, layers) for part in parts])
        norms = zip((self.target_norm, *self.layer_norms), (features.patches, *features.layers), strict=True)
        targets = [at_places(norm(each, self.ranks.world_group, update=True), places) for norm, each in norms]
        joined, summaries = torch.cat(targets, dim=-1), self._summary(features)
        return dataclasses.replace(batch, teacher_images=None, masks=masks, targets=joined, summaries=summaries)

    def _summary(self, features: Features) -> Tensor | None:
        """The summary target, if there is one."""
        if not self.summary_width:
            return None
        return features.summary if self.config.mim.summary == "cls" else Teacher.pooled(features.patches)

    def _loss(self, predictions: Outputs, targets: Outputs) -> Tensor:
        """The loss at the patches and, where it has a weight, that of the summary."""
        mim = self.config.mim
        loss = LOSSES[mim.loss](predictions.patches, targets.patches)
        if predictions.summary is None:
            return loss
        return loss + mim.summary_weight * summary_loss(predictions.summary, given(targets.summary))

    def _layers_weight(self, batch: Batch) -> float:
        """The weight of the losses of single layers at the step that the samples are of."""
        mim, train = self.config.mim, self.config.train
        step = int(batch.indices.numpy()[0]) // train.global_batch  # of a batch on the host
        return mim.layers_weight * falling_weight(step, train.steps, mim.layers_until)

    def _masks(self, batch: Batch) -> Tensor:
        """The masks of a batch, empty ones where nothing is masked: bool [n, patches]."""
        if batch.masks is not None:
            return batch.masks
        return torch.zeros(len(batch), self.config.model.vision.patches, dtype=torch.bool, device=batch.images.device)

    def _places(self, masks: Tensor) -> Tensor:
        """The patches to predict: int64 [n, k]."""
        return places_to_predict(masks, self.config.mim)

    @torch.no_grad()
    def _cosines(self, predictions: Outputs, targets: Outputs) -> Reported:
        """Cosine of predictions and targets, where that is not the loss, and the best constant's; of summaries too."""
        found = {}
        if self.config.mim.loss != "cosine" or self.summary_width:
            found["cosine"] = masked_cosines(predictions.patches, targets.patches).mean()
        found["constant_cosine"] = constant_cosine(targets.patches.flatten(0, 1))
        if predictions.summary is not None:
            summaries = given(targets.summary)
            found["summary_cosine"] = masked_cosines(predictions.summary, summaries).mean()
            found["summary_constant_cosine"] = constant_cosine(summaries)
        return found

    @property
    def _kind(self) -> str:
        """Which patches are predicted, as the names of the metrics say it."""
        return self.config.mim.predict if self.config.mim.masked_patches else "unmasked"

    def begin(self) -> Handover | None:
        """Take over the vision tower that `init.vision` names."""
        return take_over(self.towers, self.config)

    def extra_state(self) -> dict[str, Tensor]:
        """The statistics of the targets."""
        return self.target_norm.state_dict() | self.layer_norms.state_dict(prefix="layers.")

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Take back the statistics of the targets."""
        of_layers = {name: value for name, value in extra.items() if name.startswith("layers.")}
        self.target_norm.load_state_dict({name: value for name, value in extra.items() if name not in of_layers})
        self.layer_norms.load_state_dict({name.removeprefix("layers."): value for name, value in of_layers.items()})

    def evaluate(self) -> dict[str, float]:
        """Cosine on the test images beside that of the best constant prediction, and k-NN of the features."""
        if not self.config.eval.shards:
            return {}
        return self._cosine("test", self.probe.test_set()) | self.probe.of_tower(self.student)

    def finish(self, tracker: Tracker) -> dict[str, float]:
        """Measure the finished student and its baselines, and draw what it has learnt."""
        if not self.config.eval.shards:
            return {}
        metrics = self.evaluate() | self.probe.as_clip(self.student, self.teacher) | self.probe.baselines()
        if self.config.eval.knn_shards:
            metrics |= self._cosine("neighbours", self.probe.neighbours())
        tracker.results(metrics, "masked stage")
        if self.config.tracking.pictures:
            self._draw(tracker)
        return metrics

    def _cosine(self, name: str, data: EvalSet) -> dict[str, float]:
        norm = self._norm_for_tests()

        def measure(batch: ImageBatch) -> Tensor:
            """Cosine and direction of the targets, first the mean of an image's places, then the summary's if any."""
            predictions, targets, masks = self._predict(batch, norm)
            at = [at_places(each.patches, self._places(masks)) for each in (predictions, targets)]
            columns = [masked_cosines(*at).mean(1, keepdim=True), F.normalize(at[1], dim=-1).mean(1)]
            if predictions.summary is not None and targets.summary is not None:
                columns += [masked_cosines(predictions.summary, targets.summary)[:, None]]
                columns += [F.normalize(targets.summary, dim=-1)]
            return torch.cat(columns, dim=1)

        images, size = self.probe.images(data, *self._sizes), self.config.eval.batch_size
        mean = encode_all(measure, images, size, self.ranks.data_group).mean(0)
        patches, summary = mean.split([1 + self.teacher.width, len(mean) - 1 - self.teacher.width])
        found = {f"{self._kind}_cosine": patches[0].item(), "constant_cosine": patches[1:].norm().item()}
        if self.summary_width:
            found |= {"summary_cosine": summary[0].item(), "summary_constant_cosine": summary[1:].norm().item()}
        return under(name, found)

    @property
    def _sizes(self) -> tuple[int, int]:
        """Sides of an image for the student and for the teacher."""
        return self.config.model.vision.image_size, self.teacher.image_size

    @torch.no_grad()
    def _predict(self, batch: ImageBatch, norm: TargetNorm) -> tuple[Outputs, Outputs, Tensor]:
        """Predictions, targets and masks [n, patches] of some images of `_sizes`, at all their patches.

        Predictions are NaN at patches that the student does not see.
        """
        vision, device = self.config.model.vision, self.ranks.device
        drawn = [draw_mask(self.spec, 0, number) for number in batch.numbers.tolist()]
        masks = torch.from_numpy(np.stack(drawn)).to(device)
        images, teacher_images = batch.views
        seen = normalize(images.to(device), *channel_statistics(self.config.model.vision))
        places = self._places(masks) if self.config.mim.predict == "visible" else everywhere(masks)
        rows = infer(self.student, (seen, masks, places), MaskedStudent.predict, self.tokens).float()
        predicted = self._outputs(rows)
        targets = self._teach_together(teacher_images, self.ranks.model_group)
        return (
            predicted._replace(patches=put_at_places(predicted.patches, places, vision.patches)),
            targets._replace(patches=norm(targets.patches, update=False)),
            masks,
        )

    def _teach_together(self, images: Tensor, group: dist.ProcessGroup) -> Outputs:
        """The teacher's features of images that all ranks of `group` have; each computes those of a share."""
        share = math.ceil(len(images) / dist.get_world_size(group))
        return self._outputs(encode_all(self._teach_images, Rows(images), share, group))

    def _teach_images(self, images: Tensor) -> Tensor:
        """The teacher's features and summaries of images as rows, see `Outputs`."""
        features = teacher_features(self.teacher, images)
        return Outputs(features.patches, self._summary(features)).rows()

    def _outputs(self, rows: Tensor) -> Outputs:
        return Outputs.from_rows(rows, self.teacher.width, self.summary_width)

    def _norm_for_tests(self) -> TargetNorm:
        """The running statistics; before the first step, those of some of the images that k-NN looks among."""
        norm = copy.deepcopy(self.target_norm)
        if not norm.ready:
            probe, size, group = self.probe, self.teacher.image_size, self.ranks.world_group
            data = probe.neighbours() if self.config.eval.knn_shards else probe.test_set()
            numbers = np.arange(0, len(data), max(1, len(data) // self.config.eval.batch_size))
            share = math.ceil(len(numbers) / dist.get_world_size(group))
            some = probe.images(data, size, alone=True).only(numbers)
            rows = encode_all(of_images(self._teach_images), some, share, group)
            norm(self._outputs(rows).patches, update=True)
        return norm

    def _draw(self, tracker: Tracker) -> None:
        from w2s.tracking.pictures import (
            attention_picture,
            features_picture,
            masked_picture,
        )  # not before the first step

        data = self.probe.test_set()
        numbers = torch.linspace(0, len(data) - 1, self.config.tracking.pictures).long().unique()
        batch = ImageBatch(numbers, self.probe.images(data, *self._sizes).only(numbers.numpy()).read())
        predictions, targets, masks = self._predict(batch, self.target_norm)
        shown, cosines = batch.images, masked_cosines(predictions.patches, targets.patches)
        student = patch_features(self.student, shown)
        tracker.picture("masked", lambda path: masked_picture(path, shown, masks, cosines, self._kind))
        tracker.picture("features", lambda path: features_picture(path, shown, student, targets.patches))
        if self.config.model.vision.class_tokens or self.config.mim.summary_weight:
            looks = attention_of_cls(self.student, shown)
            tracker.picture("attention", lambda path: attention_picture(path, shown, looks))
