"""A teacher of the masked stage at work: from images to targets, and from predictions to a loss."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from w2s.config.lessons import Lesson
from w2s.config.sections import Config
from w2s.data.batch import require
from w2s.errors import ConfigError
from w2s.megatron.parallel.pipeline_schedule import Metrics
from w2s.megatron.parallel.process_groups import Ranks
from w2s.objectives.masked_loss import LOSSES, constant_cosine, masked_cosines
from w2s.objectives.summary import summary_loss
from w2s.teachers.base import Features, Teacher
from w2s.teachers.build import build_teacher
from w2s.teachers.features import teacher_features
from w2s.teachers.targets import target_norm
from w2s.towers.masked_student import Outputs, gather_patches


class Tutor:
    """A teacher, the statistics of its targets, and how the student learns from it.

    Args:
        config: the masked stage.
        lesson: which teacher, and how it is learnt from.
        layers: layers of it that are learnt from too.
        ranks: this process among all.

    Attributes:
        name: what its metrics are under; empty for the only teacher.
        teacher: the frozen model.
        target: what the student predicts of it.
        norm: makes targets of its features.
        layer_norms: make targets of the tokens after `layers`.
    """

    def __init__(self, config: Config, lesson: Lesson, layers: Sequence[int], ranks: Ranks) -> None:
        self.lesson, self.layers = lesson, layers
        self.name = lesson.teacher.name if len(config.lessons) > 1 else ""
        self.teacher = build_teacher(
            lesson.teacher,
            grid=config.model.vision.grid,
            device=ranks.device,
            root=config.run.root,
            parallel=config.parallel,
        )
        self.teacher.check_layers(layers, "mim.layers")
        if lesson.teacher.target_norm == "phi_s":
            _check_first_batch(config, lesson, self.teacher)
        self.target = lesson.target(self.teacher.width, self.teacher.summary_width)
        kind = lesson.teacher.target_norm
        self.norm = target_norm(self.target.width, kind).to(ranks.device)
        norms = [target_norm(self.teacher.layer_width, kind) for _ in layers]
        self.layer_norms = nn.ModuleList(norms).to(ranks.device)

    def look(self, images: Tensor, size: int) -> Features:
        """Features of images [n, 3, T, T], uint8, at most `size` at a time."""
        return Features.join([teacher_features(self.teacher, part, self.layers) for part in images.split(size)])

    def targets(self, features: Features, patch_indices: Tensor, group: ProcessGroup) -> list[Tensor]:
        """What is to be predicted at places [n, k]: [n, k, d] of the patches, then of each layer; all ranks call."""
        norms = zip((self.norm, *self.layer_norms), (features.patches, *features.layers), strict=True)
        return [gather_patches(norm(each, group, update=True), patch_indices) for norm, each in norms]

    def summary(self, features: Features) -> Tensor | None:
        """The summary that is to be predicted, if there is one."""
        if not self.target.summary_width:
            return None
        return features.summary if self.lesson.summary == "cls" else Teacher.pooled(features.patches)

    @torch.no_grad()
    def flat_outputs(self, images: Tensor) -> Tensor:
        """Its features and summaries of images, flattened, see `Outputs`."""
        features = teacher_features(self.teacher, images)
        return Outputs(features.patches, self.summary(features)).flatten()

    def compare(self, predictions: Outputs, targets: Outputs) -> tuple[Tensor, Metrics]:
        """Its share of the stage's loss, and what there is to report; shapes as in `Outputs`."""
        loss = LOSSES[self.lesson.loss](predictions.patches, targets.patches)
        if predictions.summary is not None:
            loss = loss + self.lesson.summary_weight * summary_loss(predictions.summary, require(targets.summary))
        own = {"loss": loss.detach()} if self.name else {}  # that of the only teacher is the stage's
        return self.lesson.weight * loss, own | self._cosines(predictions, targets)

    @torch.no_grad()
    def _cosines(self, predictions: Outputs, targets: Outputs) -> Metrics:
        """Cosine of predictions and targets, where that is not the loss, and the best constant's; of summaries too."""
        found = {}
        if self.lesson.loss != "cosine" or predictions.summary is not None or self.name:
            found["cosine"] = masked_cosines(predictions.patches, targets.patches).mean()
        found["constant_cosine"] = constant_cosine(targets.patches.flatten(0, 1))
        if predictions.summary is not None:
            summaries = require(targets.summary)
            found["summary_cosine"] = masked_cosines(predictions.summary, summaries).mean()
            found["summary_constant_cosine"] = constant_cosine(summaries)
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the statistics of the targets."""
        return self.norm.state_dict() | self.layer_norms.state_dict(prefix="layers.")

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back the statistics of the targets."""
        of_layers = {name: value for name, value in state.items() if name.startswith("layers.")}
        self.norm.load_state_dict({name: value for name, value in state.items() if name not in of_layers})
        self.layer_norms.load_state_dict({name.removeprefix("layers."): value for name, value in of_layers.items()})


def _check_first_batch(config: Config, lesson: Lesson, teacher: Teacher) -> None:
    """Refuse a batch that does not show how every channel of a teacher varies, which PHI-S has to know of the first."""
    vectors = config.train.global_batch * min(teacher.grid, teacher.network.grid) ** 2
    if vectors <= teacher.width:
        needed = config.train.global_batch * teacher.width // vectors + 1
        raise ConfigError(
            f"target_norm=phi_s of {lesson.teacher.name}: the first batch has {vectors} features for its "
            f"{teacher.width} channels: use train.global_batch={needed} or more"
        )
