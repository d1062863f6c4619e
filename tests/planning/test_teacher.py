"""Bytes and operations of teachers against the networks themselves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from w2s.config.load import load
from w2s.planning.teacher import planned_teacher
from w2s.teachers.base import Teacher
from w2s.teachers.build import without_weights


@pytest.mark.parametrize("name", ["eva02_e_plus", "eva_18b", "eva_s"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_eva_teacher_is_worked_out_as_its_network_is(name: str, precision: str) -> None:
    config = load("mim", [f"teacher.source=eva:{name}@none", f"teacher.precision={precision}"])
    planned = planned_teacher(config)
    network = without_weights(config.teacher, grid=16)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, network.image_size, network.image_size, device="meta"))
    teacher = Teacher(network, grid=16, precision=config.teacher.precision)
    tensors = [*teacher.parameters(), *teacher.buffers()]
    assert planned.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert planned.flops == counter.get_total_flops()
    assert (planned.width, planned.image_size) == (network.width, network.image_size)


def test_an_eva_teacher_sees_images_of_the_size_that_is_given() -> None:
    config = load("mim", ["teacher.source=eva:eva_s@none", "teacher.image_size=448"])
    planned, network = planned_teacher(config), without_weights(config.teacher, grid=32)
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 448, 448, device="meta"))
    assert planned.image_size == network.image_size == 448
    assert planned.flops == counter.get_total_flops()


def test_any_other_network_is_counted() -> None:
    """EfficientNet-Lite0 for 16 x 16 patches: 4.0 GFLOP an image and 5 million parameters (README), in float32."""
    planned = planned_teacher(load("mim", ["teacher=efficientnet_lite0", "model.vision.image_size=256"]))
    assert planned.flops / 1e9 == pytest.approx(4.0, abs=0.051)
    assert planned.width == 1280
    assert planned.weights / 4 == pytest.approx(5e6, abs=0.5e6)
