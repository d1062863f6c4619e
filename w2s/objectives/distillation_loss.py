"""Distillation from a finished CLIP: of its embeddings, and of its similarities within a batch.

A student's logits of the global batch are compared with the teacher's tile by tile, as in the contrastive loss, with
the gradient in closed form: with respect to a logit it is the difference of the softmaxes over its row, and of those
over its column. So memory is linear in the batch.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from w2s.objectives.contrastive import log_softmaxes, log_sum_exps
from w2s.objectives.tiles import TILE, FeatureGradients, LogitTiles, with_known_gradients


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance of embeddings, which is 2 - 2 cos: CLIP-KD's feature distillation.

    Source: Yang et al. 2024 (arXiv 2307.12732), section 3.2, there summed over images and texts. The mean over
    data-parallel ranks is that of the global batch.

    Args:
        student: [n, d], L2-normalised.
        teacher: [n, d], L2-normalised.
    """
    return (student - teacher).square().sum(-1).mean()


def affinity_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    teacher_scale: Tensor,
    *,
    group: ProcessGroup | None = None,
    tile: int = TILE,
) -> Tensor:
    """Return this rank's share of the divergence of the student's in-batch similarities from the teacher's.

    The mean of KL(teacher || student) over the distributions of captions for each image and of images for each caption
    of the global batch: TinyCLIP's affinity mimicking (Wu et al. 2023, arXiv 2309.12314, section 3.1), CLIP-KD's
    contrastive relational distillation (Yang et al. 2024, arXiv 2307.12732, section 3.2). A cross entropy has the same
    gradient; the divergence is 0 where both agree. The mean over the ranks of `group` is the global loss, and the mean
    of their gradients is its gradient, as data-parallel training averages them.

    Args:
        images: the student's [n, d], L2-normalised; every rank holds n of the world_size * n pairs.
        texts: the student's [n, d], L2-normalised.
        scale: scalar, the student's inverse temperature.
        teacher_images: the teacher's [n, e], L2-normalised.
        teacher_texts: the teacher's [n, e], L2-normalised.
        teacher_scale: scalar, the teacher's inverse temperature.
        group: the data-parallel group; None is one process.
        tile: rows and columns of the logits that are in memory at a time.
    """
    with torch.no_grad():
        student = LogitTiles(images, texts, scale, None, group, tile)
        teacher = LogitTiles(teacher_images, teacher_texts, teacher_scale, None, group, tile)
        (row_lse, column_lse), (teacher_row_lse, teacher_column_lse) = log_sum_exps(student), log_sum_exps(teacher)
        gradients, loss = FeatureGradients(student), images.new_zeros(())
        for ours, theirs in zip(student, teacher, strict=True):
            grad_logits = torch.zeros_like(ours.logits)
            ways = (
                log_softmaxes(ours, row_lse[0], column_lse[0]),
                log_softmaxes(theirs, teacher_row_lse[0], teacher_column_lse[0]),
            )
            for our_logs, their_logs in zip(*ways, strict=True):
                target = their_logs.exp()
                loss += target.mul(their_logs - our_logs).sum()
                grad_logits += our_logs.exp_().sub_(target)
            gradients.add(ours, grad_logits)
        known = gradients.finish(1 / (2 * len(images)))
    return with_known_gradients(loss / (2 * len(images)), (images, texts, scale), known)
