"""What CLS attends to is the same in every layout; `tests/evaluation/test_evaluator.py` has that it is the layer's."""

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.megatron.spawn import SHAPE, make_student
from w2s.config.sections import ParallelConfig
from w2s.megatron.parallel import process_groups
from w2s.megatron.parallel.attention_maps import cls_attention

LAYOUTS = {
    "alone": ParallelConfig(),
    "tensor": ParallelConfig(tensor=2, sequence=True),
    "pipeline": ParallelConfig(pipeline=2),
}


def looks() -> dict[str, Tensor]:
    images = torch.randn(3, 3, SHAPE.image_size, SHAPE.image_size, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, layout in LAYOUTS.items():
        with process_groups.initialize_groups(layout, torch.device("cpu")):
            found[name] = cls_attention(make_student(layout), images)
    return found


@pytest.mark.slow  # two ranks are started for it
def test_every_rank_of_every_layout_has_them() -> None:
    for found in run_ranks(looks, 2):
        for name in ("tensor", "pipeline"):
            torch.testing.assert_close(found[name], found["alone"], msg=lambda text, name=name: f"{name}: {text}")
