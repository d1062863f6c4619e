"""One teacher of the masked stage at work: from images to targets, and from predictions to a loss."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from w2s.config.sections import Config
from w2s.config.teacher_losses import TeacherLoss
from w2s.data.samples.batch import require
from w2s.errors import ConfigError
from w2s.megatron.parallel.pipeline_schedule import Metrics
from w2s.megatron.parallel.process_groups import Ranks
from w2s.objectives.masked_loss import (
    constant_cosine,
    masked_cosine_loss,
    masked_cosines,
    masked_loss,
    weighted,
)
from w2s.teachers.base import Features, Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.distillation.targets import target_norm
from w2s.towers.masked_student import Outputs, gather_patches


class MaskedTeacher:
    """A teacher, the statistics of its targets, and the loss on them.

    Args:
        config: the masked stage.
        teacher_loss: which teacher, and the loss.
        layers: layers of it whose tokens are targets too.
        ranks: this process among all.
        samples: how many of the first global batch have the teacher.

    Attributes:
        name: its name among several; empty for the only teacher.
        prefix: what its metrics are under, `NAME/`; empty for the only teacher.
        teacher: the frozen model.
        target: what the student predicts of it.
        norm: makes targets of its features.
        layer_norms: make targets of the tokens after `layers`.
    """

    def __init__(
        self, config: Config, teacher_loss: TeacherLoss, layers: Sequence[int], ranks: Ranks, samples: int
    ) -> None:
        self.teacher_loss, self.layers = teacher_loss, layers
        self.patch_loss = masked_loss(teacher_loss.loss)
        self.name = teacher_loss.teacher.name if len(config.teacher_losses) > 1 else ""
        self.prefix = f"{self.name}/" if self.name else ""
        self.teacher = build_teacher(
            teacher_loss.teacher,
            grid=config.model.vision.grid,
            device=ranks.device,
            root=config.run.root,
            parallel=config.parallel,
        )
        self.teacher.check_layers(layers, "mim.layers")
        if teacher_loss.teacher.target_norm == "phi_s":
            _check_first_batch(teacher_loss, self.teacher, samples, config.train.global_batch)
        self.target = teacher_loss.target(self.teacher.width, self.teacher.summary_width)
        kind = teacher_loss.teacher.target_norm
        self.norm = target_norm(self.target.width, kind).to(ranks.device)
        norms = [target_norm(self.teacher.layer_width, kind) for _ in layers]
        self.layer_norms = nn.ModuleList(norms).to(ranks.device)

    def encode(self, images: Tensor, size: int) -> Features:
        """Features of images [n, 3, T, T], uint8, at most `size` at a time; of no images without a forward pass."""
        if not len(images):
            return self._nothing(images.device)
        return Features.join([self.teacher.features_of(part, self.layers) for part in images.split(size)])

    def _nothing(self, device: torch.device) -> Features:
        teacher, count = self.teacher, len(self.layers)
        patches = torch.empty(0, teacher.grid**2, teacher.width, device=device)
        layers = torch.empty(count, 0, teacher.grid**2, teacher.layer_width, device=device)
        return Features(patches, torch.empty(0, teacher.summary_width, device=device), tuple(layers))

    def targets(self, features: Features, patch_indices: Tensor, group: ProcessGroup) -> list[Tensor]:
        """What to predict at `patch_indices` [n, k]: [n, k, d] of the patches, then of each layer; all ranks call."""
        norms = zip((self.norm, *self.layer_norms), (features.patches, *features.layers), strict=True)
        return [gather_patches(norm(each, group, update=True), patch_indices) for norm, each in norms]

    def summary(self, features: Features) -> Tensor:
        """The summary that is to be predicted, [n, e]."""
        return features.summary if self.teacher_loss.summary == "cls" else Teacher.pooled(features.patches)

    @torch.no_grad()
    def flat_outputs(self, images: Tensor) -> Tensor:
        """Its features and summaries of images, flattened, see `Outputs`."""
        features = self.teacher.features_of(images)
        return Outputs(features.patches, self.summary(features) if self.target.summary_width else None).flatten()

    def loss(self, predictions: Outputs, targets: Outputs, weights: Tensor | None) -> tuple[Tensor, Metrics]:
        """Its share of the stage's loss, and what there is to report; shapes as in `Outputs`, weights [n]."""
        loss = self.patch_loss(predictions.patches, targets.patches, weights)
        if predictions.summary is not None:
            # The angle alone: lengths do not matter, so the target needs no norm.
            summary = masked_cosine_loss(predictions.summary, require(targets.summary), weights)
            loss = loss + self.teacher_loss.summary_weight * summary
        reported = {"loss": loss.detach()} if self.name else {}  # that of the only teacher is the stage's
        return self.teacher_loss.weight * loss, reported | self._cosines(predictions, targets, weights)

    @torch.no_grad()
    def _cosines(self, predictions: Outputs, targets: Outputs, weights: Tensor | None) -> Metrics:
        """Cosine of predictions and targets, where that is not the loss, and the best constant's; of summaries too."""
        metrics = {}
        if self.teacher_loss.loss != "cosine" or predictions.summary is not None or self.name:
            metrics["cosine"] = weighted(masked_cosines(predictions.patches, targets.patches), weights).mean()
        metrics["constant_cosine"] = constant_cosine(targets.patches, weights)
        if predictions.summary is not None:
            summaries = require(targets.summary)
            metrics["summary_cosine"] = weighted(masked_cosines(predictions.summary, summaries), weights).mean()
            metrics["summary_constant_cosine"] = constant_cosine(summaries, weights)
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Return the statistics of the targets."""
        return self.norm.state_dict() | self.layer_norms.state_dict(prefix="layers.")

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the statistics of the targets."""
        of_layers = {name: value for name, value in state.items() if name.startswith("layers.")}
        self.norm.load_state_dict({name: value for name, value in state.items() if name not in of_layers})
        self.layer_norms.load_state_dict({name.removeprefix("layers."): value for name, value in of_layers.items()})


def _check_first_batch(teacher_loss: TeacherLoss, teacher: Teacher, samples: int, global_batch: int) -> None:
    """Refuse a batch that does not show how every channel of a teacher varies, which PHI-S has to know of the first."""
    vectors = samples * min(teacher.grid, teacher.network.grid) ** 2
    if not samples:
        raise ConfigError(
            f"target_norm=phi_s of {teacher_loss.teacher.name}: it has no sample of the first batch, whose "
            "features are needed: use another target_norm"
        )
    if vectors <= teacher.width:
        needed = global_batch * teacher.width // vectors + 1
        raise ConfigError(
            f"target_norm=phi_s of {teacher_loss.teacher.name}: the first batch has {vectors} features for its "
            f"{teacher.width} channels: use train.global_batch={needed} or more"
        )
