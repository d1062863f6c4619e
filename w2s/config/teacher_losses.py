"""What a student of the masked stage learns of one teacher, completed from the other sections."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from w2s.config.model_sections import MaskedLoss, TeacherConfig, TeacherEntry
from w2s.config.training_sections import MimConfig


class Target(NamedTuple):
    """What a student predicts of one teacher: the sizes of its heads."""

    width: int
    """Channels of a patch feature."""
    summary_width: int = 0
    """Channels of the summary; 0 for none."""
    name: str = ""
    """The teacher's name. The heads of the first teacher have the names that those of a single one have."""


@dataclass(frozen=True)
class TeacherLoss:
    """A teacher, and how the student learns from it."""

    teacher: TeacherConfig
    """The frozen model."""
    weight: float
    """Factor on its losses."""
    loss: MaskedLoss
    """Loss of the patches."""
    summary: Literal["cls", "pooled"]
    """What the summary is."""
    summary_weight: float
    """Weight of the summary's loss beside that of the patches; 0 for no summary."""
    share: float = 1.0
    """How often it is drawn, where a sample has one of several teachers."""
    sources: tuple[str, ...] = ()
    """The data sources whose samples it teaches; empty for all."""

    @classmethod
    def of(cls, entry: TeacherEntry, teacher: TeacherConfig, mim: MimConfig) -> "TeacherLoss":
        """Complete an entry of `teachers` from the sections `teacher` and `mim`."""
        weight = mim.summary_weight if entry.summary_weight is None else entry.summary_weight
        return cls(
            teacher=replace(
                teacher,
                name=entry.name,
                source=entry.source,
                weights=entry.weights,
                image_size=entry.image_size,
                target_norm=entry.target_norm,
                precision=entry.precision or teacher.precision,
            ),
            weight=entry.weight,
            loss=entry.loss or mim.loss,
            summary=entry.summary or mim.summary,
            summary_weight=weight,
            share=entry.share,
            sources=tuple(entry.sources),
        )

    def target(self, width: int, embedding: int) -> Target:
        """Return what is predicted of the teacher.

        Args:
            width: channels of its patch features.
            embedding: channels of its own image embedding.
        """
        summary = embedding if self.summary == "cls" else width
        return Target(width, summary if self.summary_weight else 0, self.teacher.name)
