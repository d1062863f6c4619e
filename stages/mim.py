"""The masked stage: a student learns to reproduce, at masked patches, the features of frozen teachers."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from w2s.checkpoint.starts.handover import Handover, take_over
from w2s.config.precision import compute_dtype
from w2s.config.sections import Config
from w2s.data.samples.batch import Batch, normalize, require
from w2s.data.samples.sample import SampleSpec
from w2s.evaluation.masked_evaluator import MaskedEvaluator
from w2s.megatron.parallel.optimizer import Optimizer, Towers
from w2s.megatron.parallel.pipeline_schedule import Loss, Metrics, forward_backward, means
from w2s.megatron.parallel.process_groups import Ranks
from w2s.megatron.parallel.sharded import data_parallel
from w2s.objectives.layer_losses import LayerLosses
from w2s.planning.model.teacher import planned_teachers
from w2s.teachers.distillation.masked import MaskedDistillation
from w2s.towers.build import build_student
from w2s.towers.masked_student import MaskedStudent, patch_indices_to_predict
from w2s.towers.vision import channel_statistics
from w2s.tracking.tracker import Tracker
from w2s.training.train_stage import train_stage


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
        dtype = compute_dtype(config.precision)
        self.distillation = MaskedDistillation(
            config, ranks, image_costs=lambda: [each.flops for each in planned_teachers(config)]
        )
        self.teachers: Sequence[nn.Module] = [each.teacher for each in self.distillation.teachers]
        student = build_student(config, self.distillation.targets, dtype, ranks.device, self.distillation.layer_widths)
        self.student = data_parallel(student, config.parallel, config.precision)
        self.towers: Towers = {"vision": self.student}
        self.optimizer = Optimizer(self.towers, config.optim, dtype, config.init.scratch)
        self.spec = sample_spec(config, self.distillation.image_sizes)
        self.evaluator = MaskedEvaluator(config, ranks, self.spec, self.distillation)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step: the teachers see whole images, the student masked ones, and predicts targets at some patches.

        Args:
            batch: this rank's share of the samples of its model-parallel group; all its ranks then have the images and
                the targets of all.
        """
        mim, train, vision = self.config.mim, self.config.train, self.config.model.vision
        group_batch, of_teachers = self.distillation.with_targets(batch)
        micro_batches = group_batch.split(train.micro_batch)
        layer_losses = LayerLosses(self.config, batch.first_index // train.global_batch, len(micro_batches))

        def forward(student: MaskedStudent, micro: Batch) -> tuple[Tensor, Loss]:
            targets, masks = self.distillation.targets_of(micro), require(micro.masks)
            predictions = student(
                normalize(micro.images, *channel_statistics(vision)),
                masks,
                patch_indices_to_predict(masks, mim),
                layer_losses.for_targets(targets.layers, targets.weights[0]),
                micro.branch_scales,
            )

            def loss(predictions: Sequence[Tensor]) -> tuple[Tensor, Metrics]:
                return self.distillation.loss(predictions, targets)

            return predictions, loss

        num_tokens = len(micro_batches[0]) * (vision.class_tokens + mim.num_visible(vision.patches))
        reports = forward_backward(self.student, micro_batches, forward, num_tokens)
        return {**means(reports), **means(layer_losses.reports), **of_teachers}

    def begin(self) -> Handover | None:
        """Take over the vision tower that `init.vision` names."""
        return take_over(self.towers, self.config)

    def extra_state(self) -> dict[str, Tensor]:
        """The statistics of the targets."""
        return self.distillation.state()

    def load_extra_state(self, extra: Mapping[str, Tensor]) -> None:
        """Restore the statistics of the targets."""
        self.distillation.load_state(extra)

    def evaluate(self) -> dict[str, float]:
        """Cosines on the test images beside those of the best constant predictions, and k-NN of the features."""
        return self.evaluator.measure(self.student)

    def finish(self, tracker: Tracker) -> dict[str, float]:
        """Measure the finished student and its baselines, and draw what it predicts."""
        metrics = self.evaluator.measure_finished(self.student)
        if metrics:
            tracker.results(metrics, "masked stage")
            self.evaluator.draw(self.student, tracker)
        return metrics
