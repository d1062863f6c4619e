"""A tower split over tensor-parallel ranks: loss and gradients are those of one process.

The stages refuse such layouts still; the towers are ready for them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.megatron.spawn import SHAPE, TARGET_WIDTH, make_batch
from tests.megatron.test_training import masked_forward
from w2s.config.sections import ParallelConfig
from w2s.megatron import groups
from w2s.megatron.groups import Ranks
from w2s.megatron.initialize import fill, global_name
from w2s.megatron.optimizer import data_parallel
from w2s.megatron.schedule import forward_backward
from w2s.towers.initial import vision_rule
from w2s.towers.masked import MaskedStudent

TOLERANCE = 1e-5
"""Relative to the largest value: float32 sums over a width of 32 and 8 x 17 tokens, in another order."""


def one_step(ranks: Ranks, parallel: ParallelConfig) -> tuple[Tensor, dict[str, tuple[Tensor, int | None]]]:
    """Loss of a batch, and this rank's gradients by global name with the axis that they are split over."""
    student = MaskedStudent(SHAPE, TARGET_WIDTH, parallel, torch.float32)
    fill(student, vision_rule(SHAPE, post_norm=0.5), seed=1)
    wrapped = data_parallel(student)
    wrapped.zero_grad_buffer()
    (report,) = forward_backward(wrapped, [make_batch(ranks)], masked_forward)
    gradients = {
        global_name(student, name): (
            parameter.main_grad.clone(),
            parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
        )
        for name, parameter in student.named_parameters()
    }
    return report["loss"], gradients


def split_step(parallel: ParallelConfig) -> Any:
    with groups.split(parallel, torch.device("cpu")) as ranks:
        return one_step(ranks, parallel)


@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "tensor-and-sequence"])
def test_tensor_parallel_tower_is_the_whole_tower(alone: Ranks, sequence: bool) -> None:
    loss, whole = one_step(alone, ParallelConfig())
    parts = run_ranks(split_step, 2, ParallelConfig(tensor=2, sequence=sequence))
    for part_loss, _ in parts:
        torch.testing.assert_close(part_loss, loss, rtol=TOLERANCE, atol=0)
    for name, (expected, _) in whole.items():
        (first, axis), (second, _) = (gradients[name] for _, gradients in parts)
        joined = [torch.cat([first, second], axis)] if axis is not None else [first, second]
        for gradient in joined:
            error = float((gradient - expected).abs().max() / expected.abs().max())
            assert error < TOLERANCE, f"{name}: relative error {error:.1e}"
