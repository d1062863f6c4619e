"""What a teacher makes of images as they are decoded."""

from collections.abc import Sequence

from torch import Tensor

from w2s.data.samples.batch import normalize
from w2s.teachers.base import Features, Teacher


def teacher_features(teacher: Teacher, images: Tensor, layers: Sequence[int] = ()) -> Features:
    """Return the teacher's features of uint8 images [n, 3, T, T], and those after some of its layers."""
    device = next(teacher.parameters()).device
    features: Features = teacher(normalize(images.to(device), teacher.mean, teacher.std), layers)
    return features
