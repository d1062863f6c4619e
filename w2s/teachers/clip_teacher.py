"""A CLIP as the teacher of another one: its image side and its text side, as far as they are needed."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from w2s.data.samples.batch import normalize, require
from w2s.teachers.base import Teacher

if TYPE_CHECKING:
    from w2s.teachers.text import TextTeacher


class ClipTeacher(nn.Module):
    """The frozen towers of a CLIP; one of them may be left out.

    Attributes:
        vision: the image side, or None.
        text: the text side, or None.
    """

    def __init__(self, vision: Teacher | None, text: "TextTeacher | None") -> None:
        super().__init__()
        self.vision, self.text = vision, text

    @property
    def image_size(self) -> int:
        """Side of its images in pixels; 0 where it sees none."""
        return self.vision.image_size if self.vision is not None else 0

    @property
    def widths(self) -> list[int]:
        """Channels of the embeddings of each side that is there."""
        vision = [] if self.vision is None else [self.vision.summary_width]
        return vision if self.text is None else [*vision, self.text.width]

    @property
    def logit_scale(self) -> Tensor:
        """What multiplies its cosines, a scalar; its text side has it."""
        return require(None if self.text is None else self.text.logit_scale)

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of images and captions; None for what is not given, or has no tower here.

        Args:
            images: uint8 [n, 3, T, T], or [n, frames, 3, T, T] of clips, whose embedding is that of the mean summary.
            tokens: int64 [n, context].

        Returns:
            float32 [n, d] each, L2-normalised.
        """
        image_embeddings = text_embeddings = None
        if self.vision is not None and images is not None:
            pixels = normalize(images.flatten(0, -4), self.vision.mean, self.vision.std)
            summaries = self.vision(pixels).summary.unflatten(0, (len(images), -1))
            image_embeddings = F.normalize(summaries.mean(1), dim=-1)
        if self.text is not None and tokens is not None:
            text_embeddings = F.normalize(self.text(tokens), dim=-1)
        return image_embeddings, text_embeddings
