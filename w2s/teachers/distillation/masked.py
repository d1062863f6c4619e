"""The teachers' side of the masked stage: images of a batch in, targets and weights out; predictions in, a loss out."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from w2s.config.sections import Config
from w2s.data.samples.batch import Batch, gather_batch, require
from w2s.megatron.parallel.pipeline_schedule import Metrics
from w2s.megatron.parallel.process_groups import Ranks
from w2s.teachers.distillation.load_balance import AllSamples, BalancedSamples, balance_samples
from w2s.teachers.distillation.masked_teacher import MaskedTeacher
from w2s.teachers.distillation.teacher_draw import TeacherDraw, group_indices
from w2s.towers.masked_student import Outputs, outputs_of, patch_indices_to_predict

T = TypeVar("T")


class Targets(NamedTuple):
    """What a student is to predict of the samples of a micro-batch."""

    outputs: list[Outputs]
    """Of each teacher."""
    layers: Sequence[Tensor]
    """After each pair of `mim.layers`, [n, k, layer width]."""
    weights: Sequence[Tensor | None]
    """Of the samples in the loss of each teacher, [n]; None where all count alike."""


class MaskedDistillation:
    """The teachers of the masked stage, and which samples they see on which rank, with which weights.

    Args:
        config: the masked stage.
        ranks: this process among all.
        image_costs: gives what an image costs each teacher, in any unit. It is asked only where the ranks of a
            model-parallel group share images out by it, as working it out takes seconds.

    Attributes:
        teachers: each with the statistics of its targets.
        targets: what the student predicts of each.
        layer_widths: channels that it predicts after single layers, by the layer.
        image_sizes: sides in pixels at which teachers see images, each once.
        draw: which teachers a sample has; None where every sample has every teacher.
    """

    def __init__(self, config: Config, ranks: Ranks, image_costs: Callable[[], Sequence[float]]) -> None:
        self.config, self.ranks = config, ranks
        teacher_losses = config.teacher_losses
        self.draw = TeacherDraw.of(config)
        counts = self.draw.in_first_batch() if self.draw else [config.train.global_batch] * len(teacher_losses)
        # Single layers are predicted of the first teacher alone.
        layers = [[pair.teacher for pair in config.mim.layers], *([[]] * (len(teacher_losses) - 1))]
        self.teachers = [
            MaskedTeacher(config, teacher_loss, its_layers, ranks, count)
            for teacher_loss, its_layers, count in zip(teacher_losses, layers, counts, strict=True)
        ]
        self.targets = [each.target for each in self.teachers]
        self.layer_widths = {pair.student: self.teachers[0].teacher.layer_width for pair in config.mim.layers}
        self.image_sizes = tuple(dict.fromkeys(each.teacher.image_size for each in self.teachers))
        shares_images = self.draw is not None and ranks.model_size > 1
        self._costs = image_costs() if shares_images else [1.0] * len(teacher_losses)

    def with_targets(self, batch: Batch) -> tuple[Batch, Metrics]:
        """Run the teachers on a step's samples.

        Where every sample has every teacher, each rank shows its local samples to all of them. Otherwise the group's
        samples are spread over its ranks by what the teachers that they have cost.

        Args:
            batch: this rank's share of the samples of its model-parallel group, on the host.

        Returns:
            All samples of the group with masks and targets, and what there is to report.
        """
        local, group = batch.to(self.ranks.device), self.ranks.model_group
        if self.draw is None:
            local = self._run_teachers(local, [AllSamples()] * len(self.teachers))
            return gather_batch(local, group), {"teacher_images_per_rank": torch.tensor(float(len(batch)))}
        indices = group_indices(batch.first_index, self.config.train.global_batch, self.ranks.data_size)
        drawn = self.draw.drawn(indices)
        parts = balance_samples(drawn > 0, self._costs, group)
        group_batch = self._run_teachers(gather_batch(local, group), parts)
        group_batch.teacher_weights = self._weights(torch.from_numpy(drawn))
        shares = ({"share": torch.tensor(share)} for share in (drawn > 0).mean(0).tolist())
        images = float(sum(len(part.samples) for part in parts))
        return group_batch, {"teacher_images_per_rank": torch.tensor(images)} | self.by_teacher(shares)

    def targets_of(self, micro: Batch) -> Targets:
        """Take apart what `with_targets` has put into a batch, of a micro-batch of it."""
        widths = [target.width for target in self.targets]
        parts = require(micro.targets).split([*widths, *self.layer_widths.values()], dim=-1)
        summaries: Sequence[Tensor | None] = [None] * len(widths)
        if micro.teacher_summaries is not None:
            split = micro.teacher_summaries.split([target.summary_width for target in self.targets], dim=-1)
            summaries = [each if each.shape[-1] else None for each in split]
        weights = [None] * len(widths) if micro.teacher_weights is None else micro.teacher_weights.unbind(1)
        return Targets(list(map(Outputs, parts[: len(widths)], summaries)), parts[len(widths) :], weights)

    def loss(self, predictions: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Metrics]:
        """The sum of the teachers' losses, and what there is to report of a micro-batch.

        Args:
            predictions: what the student's last chunk returns.
            targets: of the same samples.
        """
        outputs = outputs_of(predictions, self.targets)
        losses, reports = zip(
            *map(MaskedTeacher.loss, self.teachers, outputs, targets.outputs, targets.weights), strict=True
        )
        value = torch.stack(losses).sum()
        return value, {"loss": value.detach(), **self.by_teacher(reports)}

    def view_of(self, teacher: MaskedTeacher, views: Sequence[Tensor]) -> Tensor:
        """The one of the views at `image_sizes` that a teacher sees."""
        return views[self.image_sizes.index(teacher.teacher.image_size)]

    def by_teacher(self, reports: Iterable[Mapping[str, T]]) -> dict[str, T]:
        """Join the metrics of all teachers, under the teachers' names where there are several."""
        named = zip(self.teachers, reports, strict=True)
        return {f"{teacher.prefix}{name}": value for teacher, report in named for name, value in report.items()}

    def state(self) -> dict[str, Tensor]:
        """The statistics of the targets, those of the first teacher under the names that a single one's have."""
        return {
            f"{prefix}{name}": value
            for prefix, teacher in self._by_state_prefix().items()
            for name, value in teacher.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in self._by_state_prefix()}
        for name, value in state.items():
            prefix = next((each for each in parts if each and name.startswith(each)), "")
            parts[prefix][name.removeprefix(prefix)] = value
        for prefix, teacher in self._by_state_prefix().items():
            teacher.load_state(parts[prefix])

    def _by_state_prefix(self) -> dict[str, MaskedTeacher]:
        first, *others = self.teachers
        return {"": first} | {f"teachers.{teacher.name}.": teacher for teacher in others}

    def _run_teachers(self, batch: Batch, parts: Sequence[AllSamples | BalancedSamples]) -> Batch:
        """Exchange the images at the teachers' sizes for the targets at the patches to predict, and have masks.

        Args:
            batch: samples.
            parts: which of them each teacher sees on this rank.
        """
        masks, group = self._masks(batch), self.ranks.world_group
        patch_indices = patch_indices_to_predict(masks, self.config.mim)
        patches, layers, summaries = list[Tensor](), list[Tensor](), list[Tensor]()
        for teacher, part in zip(self.teachers, parts, strict=True):
            images = part.pick(self.view_of(teacher, batch.teacher_images))
            features = teacher.encode(images, self.config.train.micro_batch)
            of_patches, *of_layers = map(part.join, teacher.targets(features, part.pick(patch_indices), group))
            patches, layers = [*patches, of_patches], [*layers, *of_layers]
            if teacher.target.summary_width:
                summaries.append(part.join(teacher.summary(features)))
        return dataclasses.replace(
            batch,
            teacher_images=(),
            masks=masks,
            targets=torch.cat([*patches, *layers], dim=-1),
            teacher_summaries=torch.cat(summaries, dim=-1) if summaries else None,
        )

    def _masks(self, batch: Batch) -> Tensor:
        """The masks of a batch, empty ones where nothing is masked: bool [n, patches]."""
        if batch.masks is not None:
            return batch.masks
        return torch.zeros(len(batch), self.config.model.vision.patches, dtype=torch.bool, device=batch.images.device)

    def _weights(self, drawn: Tensor) -> Tensor:
        """Weights of samples in the losses: what `TeacherDraw.drawn` gave, with a mean of 1 over the global batch."""
        drawn = drawn.to(self.ranks.device, non_blocking=True)
        mean = drawn.mean(0)
        dist.all_reduce(mean, group=self.ranks.data_group)
        mean /= dist.get_world_size(self.ranks.data_group)
        return (drawn / mean.clamp_min(torch.finfo(mean.dtype).tiny)).float()
