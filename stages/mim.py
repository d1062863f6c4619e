"""The masked stage: a student learns to reproduce, at masked patches, the features of frozen teachers."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from w2s.checkpoint.starts.handover import Handover, take_over
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config
from w2s.config.teacher_losses import Target
from w2s.data.samples.batch import Batch, gather_batch, normalize, require
from w2s.data.samples.sample import SampleSpec, draw_mask
from w2s.data.stream.teacher_draw import TeacherDraw, group_indices
from w2s.evaluation.batched_features import TensorItems, encode_all, of_images
from w2s.evaluation.dataset import EvalSet
from w2s.evaluation.evaluate import of_sets, under
from w2s.evaluation.evaluator import Evaluator, attention_of_cls, patch_features
from w2s.evaluation.images import ImageBatch
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.pipeline_schedule import Loss, Metrics, forward_backward, infer, means
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import data_parallel
from w2s.objectives.layer_losses import LayerLosses
from w2s.objectives.masked_loss import masked_cosines
from w2s.optim.lr_schedule import falling_weight
from w2s.planning.teacher import planned_teachers
from w2s.teachers.load_balance import BalancedSamples, OwnSamples, balance_samples
from w2s.teachers.masked_teacher import MaskedTeacher
from w2s.teachers.phi_s import PhiS
from w2s.teachers.targets import TargetNorm
from w2s.towers.build import build_student
from w2s.towers.masked_student import (
    MaskedStudent,
    Outputs,
    all_patch_indices,
    gather_patches,
    outputs_of,
    patch_indices_to_predict,
    scatter_patches,
    unflatten_outputs,
)
from w2s.towers.vision import channel_statistics
from w2s.tracking.tracker import Tracker
from w2s.training.train_stage import train_stage

T = TypeVar("T")


def run(config: Config) -> None:
    """Train the masked stage."""
    train_stage(config, MaskedStage)


def sample_spec(config: Config, teacher_sizes: tuple[int, ...]) -> SampleSpec:
    """What the stage needs of a sample, with teachers whose inputs have `teacher_sizes` pixels a side."""
    return SampleSpec.of(
        config,
        teacher_sizes=teacher_sizes,
        masked_patches=config.mim.masked_patches,
        min_block=config.mim.min_block,
        block_aspect=config.mim.block_aspect,
        uniform_mask=config.mim.mask == "uniform",
    )


class MaskedStage:
    """Builds the teachers and the student; `step` is the stage."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        vision, dtype = config.model.vision, compute_dtype(config.precision)
        layers, teacher_losses = [pair.student for pair in config.mim.layers], config.teacher_losses
        self.draw = TeacherDraw.of(config)
        counts = self.draw.in_first_batch() if self.draw else [config.train.global_batch] * len(teacher_losses)
        # Single layers are learnt of the first teacher alone.
        teacher_layers = [[pair.teacher for pair in config.mim.layers], *([[]] * (len(teacher_losses) - 1))]
        self.masked_teachers = [
            MaskedTeacher(config, teacher_loss, of_lesson, ranks, count)
            for teacher_loss, of_lesson, count in zip(teacher_losses, teacher_layers, counts, strict=True)
        ]
        # Working out what a network costs takes seconds: alone, a rank has nobody to share it with.
        shared = self.draw is not None and ranks.model_size > 1
        self.costs = [each.flops for each in planned_teachers(config)] if shared else [1.0] * len(teacher_losses)
        self.teachers: Sequence[nn.Module] = [masked_teacher.teacher for masked_teacher in self.masked_teachers]
        self.targets = [masked_teacher.target for masked_teacher in self.masked_teachers]
        layer_widths = dict.fromkeys(layers, self.masked_teachers[0].teacher.layer_width)
        student = build_student(config, self.targets, dtype, ranks.device, layer_widths)
        self.student = data_parallel(student, config.parallel, config.precision)
        self.towers: Towers = {"vision": self.student}
        self.optimizer = Optimizer(self.towers, config.optim, dtype, config.init.scratch)
        self.evaluator = Evaluator(config, ranks)
        self.sizes = tuple(dict.fromkeys(masked_teacher.teacher.image_size for masked_teacher in self.masked_teachers))
        self.spec = sample_spec(config, self.sizes)
        self.target_widths = [target.width for target in self.targets], list(layer_widths.values())
        self.tokens = vision.class_tokens + config.mim.num_visible(vision.patches)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step: the teachers see whole images, the student masked ones, and predicts targets at some patches.

        Args:
            batch: this rank's share of the samples of its model-parallel group; all its ranks then have the images and
                the targets of all.
        """
        group_batch, facts = self._with_targets(batch)
        micro_batches = group_batch.split(self.config.train.micro_batch)
        layer_losses = LayerLosses(self.config.mim, self._layers_weight(batch) / len(micro_batches))

        def forward(student: MaskedStudent, micro: Batch) -> tuple[Tensor, Loss]:
            masks = require(micro.masks)
            targets, layers = self._targets_of(micro)
            images = normalize(micro.images, *channel_statistics(self.config.model.vision))
            weights = self._weights_of(micro)
            predictions = student(
                images,
                masks,
                self._patch_indices(masks),
                layer_losses.for_targets(layers, weights[0]),
                micro.branch_scales,
            )

            def loss(predictions: Sequence[Tensor]) -> tuple[Tensor, Metrics]:
                each = map(
                    MaskedTeacher.compare, self.masked_teachers, outputs_of(predictions, self.targets), targets, weights
                )
                losses, reports = zip(*each, strict=True)
                value = torch.stack(losses).sum()
                return value, {"loss": value.detach(), **self._by_teacher(reports)}

            return predictions, loss

        num_tokens = len(micro_batches[0]) * self.tokens
        reports = forward_backward(self.student, micro_batches, forward, num_tokens)
        return {**means(reports), **means(layer_losses.reports), **facts}

    def _with_targets(self, batch: Batch) -> tuple[Batch, Metrics]:
        """The samples of the model-parallel group with their targets, and facts to report.

        Where every sample has every teacher, each rank shows its own samples to all of them. Otherwise the group's
        samples are spread over its ranks by what the teachers that they have cost.
        """
        own, group = batch.to(self.ranks.device), self.ranks.model_group
        if self.draw is None:
            own = self._run_teacher(own, [OwnSamples()] * len(self.masked_teachers))
            return gather_batch(own, group), {"teacher_images_per_rank": torch.tensor(float(len(batch)))}
        indices = group_indices(batch.first_index, self.config.train.global_batch, self.ranks.data_size)
        drawn = self.draw.drawn(indices)
        shown = balance_samples(drawn > 0, self.costs, group)
        group_batch = self._run_teacher(gather_batch(own, group), shown)
        shares = ({"share": torch.tensor(share)} for share in (drawn > 0).mean(0).tolist())
        images = float(sum(len(part.samples) for part in shown))
        facts = {"teacher_images_per_rank": torch.tensor(images)} | self._by_teacher(shares)
        return dataclasses.replace(group_batch, teacher_weights=self._weights(torch.from_numpy(drawn))), facts

    def _weights(self, drawn: Tensor) -> Tensor:
        """Weights of samples in the losses: what `TeacherDraw.drawn` gave, with a mean of 1 over the global batch."""
        drawn = drawn.to(self.ranks.device, non_blocking=True)
        mean = drawn.mean(0)
        dist.all_reduce(mean, group=self.ranks.data_group)
        mean /= dist.get_world_size(self.ranks.data_group)
        return (drawn / mean.clamp_min(torch.finfo(mean.dtype).tiny)).float()

    def _weights_of(self, micro: Batch) -> Sequence[Tensor | None]:
        """The weights of a micro-batch's samples in the loss of each teacher."""
        return [None] * len(self.masked_teachers) if micro.teacher_weights is None else micro.teacher_weights.unbind(1)

    def _run_teacher(self, batch: Batch, shown: Sequence[BalancedSamples | OwnSamples]) -> Batch:
        """Exchange the images at the teachers' sizes for their features of them, at the patches to predict.

        Args:
            batch: samples.
            shown: which of them each teacher sees, and on which rank.
        """
        masks, group = self._masks(batch), self.ranks.world_group
        patch_indices = self._patch_indices(masks)
        patches, layers, summaries = list[Tensor](), list[Tensor](), list[Tensor]()
        for masked_teacher, part in zip(self.masked_teachers, shown, strict=True):
            images = part.pick(self._seen_by(masked_teacher, batch.teacher_images))
            features = masked_teacher.encode(images, self.config.train.micro_batch)
            of_patches, *of_layers = map(part.join, masked_teacher.targets(features, part.pick(patch_indices), group))
            patches, layers = [*patches, of_patches], [*layers, *of_layers]
            summaries += [part.join(each) for each in [masked_teacher.summary(features)] if each is not None]
        return dataclasses.replace(
            batch,
            teacher_images=(),
            masks=masks,
            targets=torch.cat([*patches, *layers], dim=-1),
            teacher_summaries=torch.cat(summaries, dim=-1) if summaries else None,
        )

    def _targets_of(self, micro: Batch) -> tuple[list[Outputs], Sequence[Tensor]]:
        """What is to be predicted of each teacher, and after single layers, out of what `_run_teacher` has joined."""
        target_widths, layer_widths = self.target_widths
        parts = require(micro.targets).split([*target_widths, *layer_widths], dim=-1)
        patches, layers = parts[: len(target_widths)], parts[len(target_widths) :]
        if micro.teacher_summaries is None:
            return [Outputs(each, None) for each in patches], layers
        summaries = micro.teacher_summaries.split([target.summary_width for target in self.targets], dim=-1)
        summaries_or_none = (each if each.shape[-1] else None for each in summaries)
        return [Outputs(*each) for each in zip(patches, summaries_or_none, strict=True)], layers

    def _seen_by(self, masked_teacher: MaskedTeacher, views: Sequence[Tensor]) -> Tensor:
        """The one of the teachers' views that a teacher sees."""
        return views[self.sizes.index(masked_teacher.teacher.image_size)]

    def _by_teacher(self, reports: Iterable[Mapping[str, T]]) -> dict[str, T]:
        """Metrics of each teacher, under the teachers' names where there are several."""
        return of_sets(
            {masked_teacher.name: report for masked_teacher, report in zip(self.masked_teachers, reports, strict=True)}
        )

    def _layers_weight(self, batch: Batch) -> float:
        """The weight of the losses of single layers at the step that the samples are of."""
        mim, train = self.config.mim, self.config.train
        step = batch.first_index // train.global_batch
        return mim.layers_weight * falling_weight(step, train.steps, mim.layers_until)

    def _masks(self, batch: Batch) -> Tensor:
        """The masks of a batch, empty ones where nothing is masked: bool [n, patches]."""
        if batch.masks is not None:
            return batch.masks
        return torch.zeros(len(batch), self.config.model.vision.patches, dtype=torch.bool, device=batch.images.device)

    def _patch_indices(self, masks: Tensor) -> Tensor:
        """The patches to predict: int64 [n, k]."""
        return patch_indices_to_predict(masks, self.config.mim)

    @property
    def _metric_prefix(self) -> str:
        """Which patches are predicted, as the names of the metrics say it."""
        return self.config.mim.predict if self.config.mim.masked_patches else "unmasked"

    def begin(self) -> Handover | None:
        """Take over the vision tower that `init.vision` names."""
        return take_over(self.towers, self.config)

    def extra_state(self) -> dict[str, Tensor]:
        """The statistics of the targets, those of the first teacher under the names that a single one's have."""
        first, *others = self.masked_teachers
        states = (
            (f"teachers.{masked_teacher.name}.{name}", value)
            for masked_teacher in others
            for name, value in masked_teacher.state().items()
        )
        return first.state() | dict(states)

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Restore the statistics of the targets."""
        first, *others = self.masked_teachers
        first.load_state({name: value for name, value in extra.items() if not name.startswith("teachers.")})
        for masked_teacher in others:
            prefix = f"teachers.{masked_teacher.name}."
            own = {name: value for name, value in extra.items() if name.startswith(prefix)}
            masked_teacher.load_state({name.removeprefix(prefix): value for name, value in own.items()})

    def evaluate(self) -> dict[str, float]:
        """Cosines on the test images beside those of the best constant predictions, and k-NN of the features."""
        if not self.config.eval.shards:
            return {}
        return self._cosines("test", self.evaluator.test_set()) | self.evaluator.evaluate_tower(self.student)

    def finish(self, tracker: Tracker) -> dict[str, float]:
        """Measure the finished student and its baselines, and draw what it has learnt."""
        if not self.config.eval.shards:
            return {}
        metrics = self.evaluate() | self._as_clips() | self.evaluator.baselines()
        if self.config.eval.knn_shards:
            metrics |= self._cosines("neighbours", self.evaluator.gallery_set())
        tracker.results(metrics, "masked stage")
        if self.config.tracking.pictures:
            self._draw_pictures(tracker)
        return metrics

    def _as_clips(self) -> dict[str, float]:
        """The student as the CLIP of each teacher whose summary it has learnt, beside that teacher."""
        embeds = [partial(MaskedStudent.embed, teacher=number) for number in range(len(self.masked_teachers))]
        return self._by_teacher(
            self.evaluator.evaluate_as_clip(self.student, embed, masked_teacher.teacher_loss, masked_teacher.teacher)
            for masked_teacher, embed in zip(self.masked_teachers, embeds, strict=True)
        )

    def _cosines(self, name: str, data: EvalSet) -> dict[str, float]:
        """Cosines with each teacher, and of the best constant predictions: `NAME/…`, under the teachers' names."""
        norms = [self._test_target_norm(masked_teacher) for masked_teacher in self.masked_teachers]

        def measure(batch: ImageBatch) -> Tensor:
            """Cosine and direction of the targets: the mean over an image's patches, then the summary's if any."""
            predictions, targets, masks = self._predict(batch, norms)
            return torch.cat(
                [self._measured(*each, self._patch_indices(masks)) for each in zip(predictions, targets, strict=True)],
                dim=1,
            )

        images, size = self.evaluator.images(data, *self._sizes), self.config.eval.batch_size
        mean = encode_all(measure, images, size, self.ranks.data_group).mean(0)
        parts = mean.split([2 + target.width + target.summary_width for target in self.targets])
        metrics = [self._cosines_of(part, target) for part, target in zip(parts, self.targets, strict=True)]
        return self._by_teacher(under(name, each) for each in metrics)

    @staticmethod
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

    def _cosines_of(self, mean: Tensor, target: Target) -> dict[str, float]:
        """The metrics of a teacher, from the mean of what `_measured` gave."""
        cosine, direction, summary, towards = mean.split([1, target.width, 1, target.summary_width])
        metrics = {f"{self._metric_prefix}_cosine": cosine.item(), "constant_cosine": direction.norm().item()}
        if target.summary_width:
            metrics |= {"summary_cosine": summary.item(), "summary_constant_cosine": towards.norm().item()}
        return metrics

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Sides of an image for the student and for the teachers."""
        return self.config.model.vision.image_size, *self.sizes

    @torch.no_grad()
    def _predict(self, batch: ImageBatch, norms: Sequence[nn.Module]) -> tuple[list[Outputs], list[Outputs], Tensor]:
        """Predictions, targets and masks [n, patches] of some images of `_sizes`, at all their patches.

        Predictions are NaN at patches that the student does not see.
        """
        vision, device = self.config.model.vision, self.ranks.device
        drawn = [draw_mask(self.spec, 0, number) for number in batch.numbers.tolist()]
        masks = torch.from_numpy(np.stack(drawn)).to(device)
        images, *views = batch.views
        normalized = normalize(images.to(device), *channel_statistics(self.config.model.vision))
        patch_indices = self._patch_indices(masks) if self.config.mim.predict == "visible" else all_patch_indices(masks)
        flattened = infer(self.student, (normalized, masks, patch_indices), MaskedStudent.predict, self.tokens).float()
        predictions = [
            each._replace(patches=scatter_patches(each.patches, patch_indices, vision.patches))
            for each in unflatten_outputs(flattened, self.targets)
        ]
        targets = []
        for masked_teacher, norm in zip(self.masked_teachers, norms, strict=True):
            outputs = self._run_teacher_sharded(
                masked_teacher, self._seen_by(masked_teacher, views), self.ranks.model_group
            )
            targets.append(outputs._replace(patches=norm(outputs.patches, update=False)))
        return predictions, targets, masks

    def _run_teacher_sharded(self, masked_teacher: MaskedTeacher, images: Tensor, group: dist.ProcessGroup) -> Outputs:
        """A teacher's features of images that all ranks of `group` have; each computes those of a share."""
        share = math.ceil(len(images) / dist.get_world_size(group))
        return Outputs.unflatten(
            encode_all(masked_teacher.flat_outputs, TensorItems(images), share, group), masked_teacher.target
        )

    def _test_target_norm(self, masked_teacher: MaskedTeacher) -> TargetNorm | PhiS:
        """The running statistics; before the first step, those of some of the images that k-NN looks among."""
        norm = copy.deepcopy(masked_teacher.norm)
        if not norm.ready:
            evaluator, size, group = self.evaluator, masked_teacher.teacher.image_size, self.ranks.world_group
            data = evaluator.gallery_set() if self.config.eval.knn_shards else evaluator.test_set()
            numbers = np.arange(0, len(data), max(1, len(data) // self.config.eval.batch_size))
            share = math.ceil(len(numbers) / dist.get_world_size(group))
            images = evaluator.images(data, size, alone=True).only(numbers)
            flattened = encode_all(of_images(masked_teacher.flat_outputs), images, share, group)
            norm(Outputs.unflatten(flattened, masked_teacher.target).patches, update=True)
        return norm

    def _draw_pictures(self, tracker: Tracker) -> None:
        # Not before the first step, for matplotlib's sake.
        from w2s.tracking.report.pictures import attention_picture, features_picture, masked_picture

        data = self.evaluator.test_set()
        numbers = torch.linspace(0, len(data) - 1, self.config.tracking.pictures).long().unique()
        batch = ImageBatch(numbers, self.evaluator.images(data, *self._sizes).only(numbers.numpy()).read())
        predictions, targets, masks = self._predict(
            batch, [masked_teacher.norm for masked_teacher in self.masked_teachers]
        )
        shown, student = batch.images, patch_features(self.student, batch.images)
        for masked_teacher, predicted, target in zip(self.masked_teachers, predictions, targets, strict=True):
            name, cosines = (
                f"_{masked_teacher.name}" if masked_teacher.name else "",
                masked_cosines(predicted.patches, target.patches),
            )
            of_masks = partial(masked_picture, images=shown, masks=masks, cosines=cosines, kind=self._metric_prefix)
            tracker.picture(f"masked{name}", of_masks)
            tracker.picture(
                f"features{name}", partial(features_picture, images=shown, student=student, teacher=target.patches)
            )
        if self.config.model.vision.class_tokens or any(target.summary_width for target in self.targets):
            looks = attention_of_cls(self.student, shown)
            tracker.picture("attention", lambda path: attention_picture(path, shown, looks))
